"""Runs the parity tests and writes what they measured into docs/parity.json and the table of docs/parity.md.

python -m benchmarks.parity
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, commit

RESULTS = ROOT / "docs" / "parity.json"
DOCUMENT = ROOT / "docs" / "parity.md"
PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime")


def measure() -> dict[str, Any]:
    """Run the parity tests and return their errors with commit, machine and versions."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "errors.json"
        command = [sys.executable, "-m", "pytest", "tests/test_parity.py", "--parity-report", str(report)]
        subprocess.run(command, cwd=ROOT, check=True)
        errors = json.loads(report.read_text())
    return {
        "commit": commit(),
        "machine": f"{platform.machine()}, CPU",
        "versions": {package: version(package) for package in PACKAGES},
        "dtype": "fp32",
        "errors": errors,
    }


def table(results: dict[str, Any]) -> str:
    """Return the measured errors as Markdown: a row per case."""
    versions = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    worst = max(row["error"] for row in results["errors"])
    lines = [
        f"{len(results['errors'])} cases, worst {worst:.1e}. Commit {results['commit']}, {results['machine']}, "
        f"{results['dtype']}, {versions}.",
        "",
        "| feature | case | relative RMS error |",
        "|---|---|---|",
    ]
    lines += [f"| {row['group']} | {row['case']} | {row['error']:.1e} |" for row in results["errors"]]
    return "\n".join(lines)


def with_table(document: str, results: dict[str, Any]) -> str:
    """Return `document` with the part between its two markers replaced by the table."""
    begin, end = "<!-- generated: python -m benchmarks.parity -->", "<!-- end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n\n{table(results)}\n\n{end}", document)


def main() -> None:
    """Measure, and write both files."""
    results = measure()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(), results))


if __name__ == "__main__":
    main()
