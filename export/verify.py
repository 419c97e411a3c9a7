"""What an operator runs before a server starts: is a model repository as the export wrote it?

`python -m export.verify --output DIR` reads every file and compares its SHA-256 with the manifest. It exits with 0, or
with 1 and a sentence for each damaged ensemble: what is wrong, and the command that repairs it. It needs nothing but
the standard library, so that it also runs in Triton's container.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.inspection import QUICK_SUM_BYTES, Inspection, inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 where everything is as exported, otherwise 1."""
    options = _parser().parse_args(arguments)
    try:
        if not options.output.is_dir():
            return _fail([f"There is no model repository at {options.output}: `python -m export` makes one."])
        inspection = inspect(options.output, QUICK_SUM_BYTES if options.quick else None)
    except OSError as error:
        return _fail([f"{error.filename or options.output} can't be read: {error.strerror or error}."])
    if problems := inspection.damage_sentences() + inspection.warning_sentences():
        return _fail(problems)
    if not inspection.manifests:
        return _fail([f"{options.output} holds no export: `python -m export` writes one."])
    print(_summary(inspection, quick=options.quick))
    return 0


def _fail(sentences: Sequence[str]) -> int:
    for sentence in sentences:
        print(f"verify: {sentence}", file=sys.stderr)
    return 1


def _summary(inspection: Inspection, *, quick: bool) -> str:
    sizes = [record.size for manifest in inspection.manifests.values() for record in manifest.files.values()]
    checked = "sizes, headers and the sums of small files" if quick else "all sums"
    return (
        f"{inspection.repository}: {', '.join(inspection.manifests)} as exported ({len(sizes)} files, "
        f"{sum(sizes) / 1e9:.2f} GB; {checked})."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export.verify", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the model repository")
    parser.add_argument(
        "--quick", action="store_true", help="what `python -m server` checks at each start: no sums of large files"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
