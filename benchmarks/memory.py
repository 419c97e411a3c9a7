"""Peak memory of the whole server over the audio's length and the number of candidates, idle and under load.

`python -m benchmarks.memory`; about ten minutes. Each case has a server of its own, so that no peak is another case's.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from audioldm2_client import AudioLDM2Client

from benchmarks.process_memory import TreeMemory
from benchmarks.report import Plot, Report, Table
from benchmarks.repositories import export_new_checkpoint
from server import EmbeddedServer

LENGTHS_S = (2.5, 10.0, 40.0, 80.0, 150.0)
CANDIDATES = (1, 4)
STEPS = 2
CLIENTS = 16
SETTLE_S = 2.0


def measure_case(repository: Path, length_s: float, candidates: int) -> dict[str, Any]:
    """Generate once on a new server; return its memory before, at its peak and afterwards, in MiB."""
    with (
        EmbeddedServer(repository) as server,
        AudioLDM2Client(server.grpc_url, timeout_s=1200.0) as client,
        TreeMemory(server.pid) as memory,
    ):
        idle = memory.now()
        result = client.generate(
            "a dog barking",
            audio_length_in_s=length_s,
            num_waveforms_per_prompt=candidates,
            num_inference_steps=STEPS,
            seed=0,
        )
        if result.audio.shape != (candidates, int(length_s * result.sampling_rate)):
            raise RuntimeError(f"got audio of shape {result.audio.shape}")
        peak, peak_of = memory.peak, dict(memory.peak_of)
        time.sleep(SETTLE_S)
        return {"idle": idle, "peak": peak, "afterwards": memory.now(), "peak_of": peak_of}


def measure_load(repository: Path) -> dict[str, float]:
    """Let many clients generate at once; return the memory before and at its peak, in MiB."""
    with (
        EmbeddedServer(repository) as server,
        AudioLDM2Client(server.grpc_url) as client,
        TreeMemory(server.pid) as memory,
    ):
        idle = memory.now()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(
                pool.map(
                    lambda seed: client.generate(
                        "a dog barking", audio_length_in_s=2.56, num_inference_steps=10, seed=seed
                    ),
                    range(2 * CLIENTS),
                )
            )
        return {"idle": idle, "peak": memory.peak}


def tabulate(cases: dict[tuple[float, int], dict[str, Any]], load: dict[str, float], report: Report) -> None:
    """Add the peaks, the share of every process in the highest one, and the plot."""
    report.add(
        Table(
            f"Memory of tritonserver and all its models, demo size, {STEPS} steps",
            ("audio", "idle", "peak", "afterwards"),
            (
                *(
                    (
                        f"{candidates} x {length_s:g} s",
                        *(f"{case[name]:.0f} MiB" for name in ("idle", "peak", "afterwards")),
                    )
                    for (length_s, candidates), case in cases.items()
                ),
                (f"{CLIENTS} clients x 2.56 s", f"{load['idle']:.0f} MiB", f"{load['peak']:.0f} MiB", ""),
            ),
            note="Proportional set sizes: what processes share counts once.",
        )
    )
    (length_s, candidates), worst = max(cases.items(), key=lambda item: item[1]["peak"])
    report.add(
        Table(
            f"The peak of every process alone, {candidates} x {length_s:g} s",
            ("process", "peak"),
            tuple(
                (name, f"{size:.0f} MiB")
                for name, size in sorted(worst["peak_of"].items(), key=lambda item: -item[1])
                if size > 1
            ),
        )
    )
    report.plots.append(
        Plot(
            "Peak memory of the server",
            "audio in s",
            "MiB",
            {
                f"{count} candidate{'s' * (count > 1)}": [
                    (length_s, case["peak"]) for (length_s, candidates), case in cases.items() if candidates == count
                ]
                for count in CANDIDATES
            },
            markers=True,
        )
    )


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=float, nargs="+", default=LENGTHS_S, help="seconds of audio")
    arguments = parser.parse_args()
    report = Report("memory", "Memory", "python -m benchmarks.memory")
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        repository = export_new_checkpoint(Path(folder))
        load = measure_load(repository)
        cases = {}
        for candidates in CANDIDATES:
            for length_s in arguments.lengths:
                cases[length_s, candidates] = measure_case(repository, length_s, candidates)
                print(f"{candidates} x {length_s:g} s: {cases[length_s, candidates]['peak']:.0f} MiB", flush=True)
    report.measurements["load"] = load
    report.measurements["cases"] = [
        {"length_s": length_s, "candidates": candidates, **case} for (length_s, candidates), case in cases.items()
    ]
    tabulate(cases, load, report)
    report.save()


if __name__ == "__main__":
    main()
