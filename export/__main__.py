"""The command line: python -m export --checkpoint DIR_OR_HUB_ID --output model_repository."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.errors import ExportError
from export.exported import read_record
from export.model_names import ENSEMBLE, ONNX_STAGES, PRECISION_NAMES, STAGES, ModelNames
from export.output_folder import check_output
from export.target import AUTO, TARGETS, choose_target


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 1 with a sentence on stderr, or 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may have letters that the terminal's encoding hasn't
            stream.reconfigure(errors="backslashreplace")
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        _export(options)
    except (ExportError, OSError, ValueError) as error:
        print(f"export: {error} Nothing was changed in {options.output}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"export: interrupted. Nothing was changed in {options.output}.", file=sys.stderr)
        return 130
    print(f"{options.output} is ready: python -m server --model-repository {shlex.quote(str(options.output))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export an AudioLDM 2 checkpoint as a Triton model repository and verify every stage.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR_OR_HUB_ID", help="a folder in diffusers' layout, or cvssp/audioldm2"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the model repository to fill")
    parser.add_argument(
        "--name", default=ENSEMBLE, help="of the ensemble, for several checkpoints side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--target",
        choices=(AUTO, *TARGETS),
        default=AUTO,
        help="what it will run on: for a GPU, the ONNX stages are computed in fp16 where their verification allows it "
        "(default: %(default)s, the GPU where this machine has one)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISION_NAMES,
        default="fp32",
        help="of the UNet's weights, whatever the target (default: %(default)s; the server rounds them on a GPU)",
    )
    parser.add_argument(
        "--fp16-stages",
        nargs="+",
        choices=ONNX_STAGES,
        metavar="STAGE",
        help=f"of {', '.join(ONNX_STAGES)}: computed in fp16, whatever the target; the others stay in fp32",
    )
    return parser


def _export(options: argparse.Namespace) -> None:
    names = ModelNames(options.name)
    check_output(options.output, names)
    checkpoint = Checkpoint.find(options.checkpoint, say=print)
    before = read_record(options.output, names)
    if before and before.checkpoint != checkpoint.name:
        print(
            f"export: {options.output} holds {names.ensemble} of {before}: that of {checkpoint.name} replaces it once "
            f"every stage is verified.",
            file=sys.stderr,
        )
    # Here, so that whatever is wrong with the arguments is told before the seconds that these libraries take to import.
    import diffusers
    import transformers

    from export.repository import StageResult, export_checkpoint

    target = choose_target(options.target)
    if target == "gpu":
        print("export: for a GPU, ONNX stages in fp16 where verified; --target cpu leaves them in fp32.")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    with tqdm(total=len(STAGES), unit="stage", leave=False, disable=None) as bar:

        def report(stage: str, result: StageResult) -> None:
            verified = "written" if result.relative_error is None else f"relative error {result.relative_error:.1e}"
            if result.refusal:
                bar.write(f"{stage:12}  stays in fp32; in fp16, {result.refusal}")
            bar.write(f"{stage:12}  {verified:22}  {result.seconds:5.1f} s{'  fp16' * result.fp16}")
            bar.update()

        export_checkpoint(
            checkpoint,
            options.output,
            name=options.name,
            target=target,
            precision=options.precision,
            fp16_stages=options.fp16_stages,
            on_start=bar.set_description,
            on_done=report,
        )


if __name__ == "__main__":
    sys.exit(main())
