"""Triton's own load generator, perf_analyzer, against the served ensemble, over gRPC and HTTP.

`make perf`; about ten minutes. The program comes from the wheel of an older tritonclient, which is fetched, and only
unpacked; later ones don't have it, and the package `perf-analyzer` on the index is an empty placeholder (0.1.0).
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from benchmarks.load import PROMPTS
from benchmarks.report import ROOT, Report, Table
from benchmarks.repositories import export_new_checkpoint
from server import EmbeddedServer

WHEEL = "tritonclient==2.50.0"
PLATFORM = "manylinux1_x86_64"
LIBRARIES = {"libb64": "libb64.so.0d", "libcudart": "libcudart.so.12"}
"""What it is linked to; nvidia-pytriton brings both, under names with a checksum in them."""

CONCURRENCIES = (1, 2, 4, 8, 16)
SHAPES = {"prompt": 1, "num_inference_steps": 1, "audio_length_in_s": 1, "seed": 1}
COUNTER = "Inferences/Second"


def fetch(folder: Path) -> Path:
    """Return the program, from `folder` or, where it isn't there yet, from the package index.

    Raises:
        subprocess.CalledProcessError: pip can't get the wheel.
        RuntimeError: nvidia-pytriton doesn't have a library that the program needs.
    """
    program = folder / "perf_analyzer"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--platform", PLATFORM, "--dest", str(folder), WHEEL], check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/perf_analyzer"))
            program.write_bytes(archive.read(member))
        program.chmod(0o755)
        wheel.unlink()
    libraries = Path(str(distribution("nvidia-pytriton").locate_file("nvidia_pytriton.libs")))
    for prefix, name in LIBRARIES.items():
        found = sorted(libraries.glob(f"{prefix}-*"))
        if not found:
            raise RuntimeError(f"{libraries} has no {prefix}, which perf_analyzer needs: is nvidia-pytriton installed?")
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(found[0])
    return program


def write_inputs(path: Path, length_s: float, steps: int) -> None:
    """Write realistic requests, through which perf_analyzer goes in turns: several prompts, two lengths."""
    requests = [
        {
            "prompt": [prompt],
            "num_inference_steps": [steps],
            "audio_length_in_s": [length],
            "seed": [seed],
        }
        for seed, prompt in enumerate(PROMPTS)
        for length in (length_s, 2 * length_s)
    ]
    path.write_text(json.dumps({"data": requests}))


def run(
    program: Path, server: EmbeddedServer, protocol: str, concurrency: int, inputs: Path, requests: int
) -> dict[str, str]:
    """Load the server once; return the row of perf_analyzer's report."""
    url = server.grpc_url if protocol == "grpc" else server.http_url
    result = inputs.with_name(f"{protocol}_{concurrency}.csv")
    command = [str(program), "-m", "audioldm2", "-u", url, "-i", protocol, "--input-data", str(inputs)]
    command += [f"--shape={name}:{size}" for name, size in SHAPES.items()]
    command += ["--concurrency-range", str(concurrency), "--request-count", str(requests), "-f", str(result)]
    command += ["--percentile=95", "--verbose-csv"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(program.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode or not result.exists():
        said = (done.stderr or done.stdout)[-2000:]
        raise RuntimeError(f"perf_analyzer, {protocol}, concurrency {concurrency}: exit {done.returncode}: {said}")
    with result.open() as file:
        (row,) = csv.DictReader(file)
    return row


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load an embedded server over both protocols; return the rows by protocol and concurrency."""
    program = fetch(ROOT / ".demo" / "perf_analyzer")
    rows: dict[str, Any] = {"grpc": {}, "http": {}}
    with tempfile.TemporaryDirectory(prefix="perf-") as name:
        folder = Path(name)
        inputs = folder / "inputs.json"
        write_inputs(inputs, arguments.length, arguments.steps)
        with EmbeddedServer(export_new_checkpoint(folder), expose_internals=True) as server:
            run(program, server, "grpc", 4, inputs, 8)  # warm up
            for concurrency in arguments.concurrencies:
                for protocol, found in rows.items():
                    requests = max(arguments.requests, 4 * concurrency)
                    found[concurrency] = run(program, server, protocol, concurrency, inputs, requests)
                    print(f"{protocol}, {concurrency}: {found[concurrency][COUNTER]} requests/s", flush=True)
    return rows


def tabulate(rows: dict[str, Any], arguments: argparse.Namespace, report: Report) -> None:
    """Add throughput and latencies."""
    first = {protocol: float(next(iter(found.values()))[COUNTER]) for protocol, found in rows.items()}
    report.add(
        Table(
            f"perf_analyzer, {arguments.steps} steps, {arguments.length:g} and {2 * arguments.length:g} s",
            ("protocol", "concurrency", "throughput", "of concurrency 1", "p50", "p95", "p99"),
            tuple(
                (
                    protocol,
                    str(concurrency),
                    f"{float(row[COUNTER]):.2f} requests/s",
                    f"{float(row[COUNTER]) / first[protocol]:.2f}",
                    *(f"{int(row[f'p{percentile} latency']) / 1e6:.2f} s" for percentile in (50, 95, 99)),
                )
                for protocol, found in rows.items()
                for concurrency, row in found.items()
            ),
            note=f"One run each, of {arguments.requests} requests, or four per client where that is more.",
        )
    )


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=float, default=0.64, help="seconds of audio of the shorter requests")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--concurrencies", type=int, nargs="+", default=CONCURRENCIES)
    arguments = parser.parse_args()
    report = Report("load_perf_analyzer", "Load: perf_analyzer, demo size", "make perf")
    rows = measure(arguments)
    report.measurements.update(rows)
    tabulate(rows, arguments, report)
    report.save()


if __name__ == "__main__":
    main()
