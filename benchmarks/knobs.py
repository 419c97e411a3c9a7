"""What each setting of docs/tuning.md does on this machine: one request alone, and many at once.

`python -m benchmarks.knobs`; about ten minutes. Every setting has a server of its own, and they take turns.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.load import CLIENTS, MIX, Call, Generate, draw_calls, run_closed_loop, served
from benchmarks.report import Report, Samples, Table
from benchmarks.repositories import Edit, copy_with, export_new_checkpoint, instances, parameter

ONNX_MODELS = ("text_encoder", "gpt2", "vae", "vocoder")
ALONE = {
    "2.56 s, 20 steps": Call(0.0, "a dog", 2.56, 20, seed=0),
    "0.64 s, 5 steps": Call(0.0, "a dog", 0.64, 5, seed=0),
}


@dataclass(frozen=True)
class Setting:
    """One change to the server.

    Attributes:
        edits: Of configurations, by model.
        environment: Variables of the server's.
    """

    edits: Mapping[str, Sequence[Edit]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def of_onnx_models(key: str, value: str) -> dict[str, list[Edit]]:
    """Return the edits that set a parameter of all models in ONNX Runtime."""
    return {model: [parameter(key, value)] for model in ONNX_MODELS}


SETTINGS = {
    "as committed": Setting(),
    "unet: max_rows 2": Setting({"unet": [parameter("max_rows", "2")]}),
    "unet: max_rows 8": Setting({"unet": [parameter("max_rows", "8")]}),
    "unet: max_frames_per_forward 512": Setting({"unet": [parameter("max_frames_per_forward", "512")]}),
    "unet: text_buckets 512": Setting({"unet": [parameter("text_buckets", "512")]}),
    "unet: 2 instances": Setting({"unet": [instances(2)]}),
    "vae, vocoder: 2 instances": Setting({"vae": [instances(2)], "vocoder": [instances(2)]}),
    "ONNX Runtime: 1 thread": Setting(of_onnx_models("intra_op_thread_count", "1")),
    "ONNX Runtime: threads spin": Setting(of_onnx_models("session.intra_op.allow_spinning", "1")),
    "GOMP_SPINCOUNT=1000": Setting(environment={"GOMP_SPINCOUNT": "1000"}),
    "GOMP_SPINCOUNT=10000": Setting(environment={"GOMP_SPINCOUNT": "10000"}),
    "GOMP_SPINCOUNT=300000": Setting(environment={"GOMP_SPINCOUNT": "300000"}),
    "OMP_WAIT_POLICY=PASSIVE": Setting(environment={"OMP_WAIT_POLICY": "PASSIVE"}),
}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in the block."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def start(folder: Path, settings: Mapping[str, Setting], stack: ExitStack) -> dict[str, Generate]:
    """Start a server for each setting."""
    exported = export_new_checkpoint(folder)
    servers = {}
    for number, (name, setting) in enumerate(settings.items()):
        edits = {model: list(changes) for model, changes in setting.edits.items()}
        edits.setdefault("unet", []).append(parameter("max_queue_size", "1000"))
        with environment(setting.environment):
            servers[name] = served(copy_with(exported, folder / str(number), edits), stack)
    return servers


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=24, help="at once")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    report = Report("knobs", "Settings, demo size", "python -m benchmarks.knobs")
    alone: dict[str, dict[str, list[float]]] = {name: {call: [] for call in ALONE} for name in SETTINGS}
    together: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory(prefix="knobs-") as folder, ExitStack() as stack:
        servers = start(Path(folder), SETTINGS, stack)
        for repeat in range(-1, arguments.repeats):  # the first time to warm up
            for name, generate in servers.items():
                seconds = {}
                for kind, call in ALONE.items():
                    start_s = time.perf_counter()
                    generate(call)
                    seconds[kind] = time.perf_counter() - start_s
                rate = run_closed_loop(generate, draw_calls(1.0, arguments.requests, seed=repeat))
                if repeat >= 0:
                    together[name].append(rate)
                    for kind in ALONE:
                        alone[name][kind].append(seconds[kind])
    report.measurements.update(alone=alone, together=together)
    report.add(
        Table(
            f"One request alone, and {CLIENTS} clients with mixed ones ({MIX})",
            ("setting", *ALONE, f"{CLIENTS} clients"),
            tuple(
                (
                    name,
                    *(str(Samples(tuple(values), "s")) for values in alone[name].values()),
                    str(Samples(tuple(together[name]), "requests/s")),
                )
                for name in SETTINGS
            ),
        )
    )
    report.save()


if __name__ == "__main__":
    main()
