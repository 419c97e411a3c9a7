"""How long callers wait when a stage dies or stands still: each stage, idle and busy, killed and stopped.

`python -m benchmarks.faults`; about eight minutes.
"""

import argparse
import tempfile
from pathlib import Path
from unittest import mock

from benchmarks.report import Report, Samples, Table
from benchmarks.repositories import export_new_checkpoint
from server import EmbeddedServer, embedded
from server.watchdog import RestartPolicy
from tests.helpers.faults import Recovery, fail_and_recover, reference

PAUSES_S = (None, 1.5, 10.0)
CALLERS = (0, 2)


def describe(pause_s: float | None) -> str:
    """Name a fault."""
    return "killed" if pause_s is None else f"stopped for {pause_s:g} s"


def measure(server: EmbeddedServer) -> dict[str, list[Recovery]]:
    """Let every stage fail in every way.

    Raises:
        AssertionError: A caller got something wrong.
    """
    audio = reference(server)
    seen: dict[str, list[Recovery]] = {}
    stages = sorted(server.stages)
    for pause_s in PAUSES_S:
        for callers in CALLERS:
            name = f"{describe(pause_s)}, {'idle' if callers == 0 else f'{callers} requests in flight'}"
            for stage in stages:
                recovery = fail_and_recover(server, stage, pause_s, callers)
                expected = f"[UNAVAILABLE] stage {stage} "
                wrong = [answer.error for answer in recovery.answers if expected not in answer.error]
                if wrong or recovery.audio != audio:
                    raise AssertionError(f"{stage}, {name}: {wrong or 'another audio'}")
                seen.setdefault(name, []).append(recovery)
    return seen


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    report = Report("faults", "Faults", "python -m benchmarks.faults")
    policy = mock.patch.object(embedded, "RestartPolicy", return_value=RestartPolicy(stable_s=0.0))
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        repository = export_new_checkpoint(Path(folder))
        with policy, EmbeddedServer(repository) as server:
            seen = measure(server)
    for name, recoveries in seen.items():
        report.measurements[name] = [
            {"unready_s": r.unready_s, "answered_s": r.answered_s, "well_s": r.well_s} for r in recoveries
        ]
    rows = tuple(
        (
            name,
            str(Samples(tuple(r.unready_s for r in recoveries), "s")),
            str(Samples(tuple(r.answered_s for r in recoveries), "s")) if recoveries[0].answers else "",
            str(Samples(tuple(r.well_s for r in recoveries), "s")),
        )
        for name, recoveries in seen.items()
    )
    report.add(
        Table(
            "Seconds from the fault (demo checkpoint)",
            ("each stage once", "the server isn't ready", "callers are answered", "a generation is right again"),
            rows,
            note="Callers in flight got UNAVAILABLE with the stage's name; no audio was wrong.",
        )
    )
    report.save()


if __name__ == "__main__":
    main()
