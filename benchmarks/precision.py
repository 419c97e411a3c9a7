"""What half precision costs in accuracy: each stage against PyTorch in fp32, and the audio against the fp32 server's.

`python -m benchmarks.precision`; a few minutes. Demo size: the weights are random, so real ones must be measured anew;
`python -m export` prints every stage's error for them.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from audioldm2_client import AudioLDM2Client

from benchmarks.load import PROMPTS
from benchmarks.report import Report, Samples, Table
from export.checkpoint import Checkpoint
from export.demo import write_checkpoint
from export.onnx_stage import relative_error
from export.repository import ONNX_STAGES, StageResult, export_checkpoint
from server import EmbeddedServer

STAGES = tuple(stage for stage in ONNX_STAGES if stage != "clap_audio")
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bf16 UNet": ("bf16", ()),
    "fp16 UNet": ("fp16", ()),
    **{f"fp16 {stage}": ("fp32", (stage,)) for stage in STAGES},
    "fp16 UNet, text_encoder and gpt2": ("fp16", ("text_encoder", "gpt2")),
    "everything in fp16": ("fp16", STAGES),
}


def generate(repository: Path, steps: int) -> list[np.ndarray]:
    """Return the audio of every prompt, each with a seed of its own."""
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer(repository))
        client = stack.enter_context(AudioLDM2Client(server.grpc_url))
        return [
            client.generate(prompt, audio_length_in_s=1.28, num_inference_steps=steps, seed=seed).audio
            for seed, prompt in enumerate(PROMPTS)
        ]


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    report = Report("precision", "Half precision: its error", "python -m benchmarks.precision")
    rows = []
    with tempfile.TemporaryDirectory(prefix="precision-") as name:
        folder = Path(name)
        write_checkpoint(folder / "checkpoint")
        checkpoint = Checkpoint.find(str(folder / "checkpoint"))
        export_checkpoint(checkpoint, folder / "fp32", on_start=print, on_done=lambda *_: None)
        exact = generate(folder / "fp32", arguments.steps)
        for number, (way, (precision, fp16_stages)) in enumerate(WAYS.items()):
            stages: dict[str, StageResult] = {}
            repository = folder / str(number)
            export_checkpoint(
                checkpoint,
                repository,
                precision=precision,
                fp16_stages=fp16_stages,
                on_start=lambda _: None,
                on_done=stages.__setitem__,
            )
            errors = [
                relative_error(got, want)
                for got, want in zip(generate(repository, arguments.steps), exact, strict=True)
            ]
            halved = [*fp16_stages, *(["unet"] if precision != "fp32" else [])]
            of_stages = ", ".join(f"{stage} {stages[stage].relative_error:.1e}" for stage in halved)
            rows.append((way, of_stages, str(Samples(tuple(errors), "relative RMS"))))
            report.measurements[way] = {"stages": of_stages, "audio": errors}
            print(*rows[-1], flush=True)
    report.add(
        Table(
            f"Each stage alone, and the audio of 1.28 s after {arguments.steps} steps (demo)",
            ("what is rounded", "a stage's error", "the audio's error"),
            tuple(rows),
        )
    )
    report.save()


if __name__ == "__main__":
    main()
