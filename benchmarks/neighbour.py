"""What waiting threads cost: one request alone, and beside a process that keeps a core busy.

`python -m benchmarks.neighbour`; three minutes. It decides the default of GOMP_SPINCOUNT in `server/embedded.py`: how
long OpenMP's threads wait actively for their next work.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.knobs import environment
from benchmarks.load import Call, Generate, served
from benchmarks.report import Report, Samples, Table
from benchmarks.repositories import export_new_checkpoint

CALL = Call(0.0, "a dog", 2.56, 20, seed=0)
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "`OMP_WAIT_POLICY=PASSIVE`": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"`GOMP_SPINCOUNT={count}`": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 3000, 10_000)},
}


def keep_busy() -> None:
    """Compute until somebody ends it."""
    while True:
        pass


@contextmanager
def neighbour() -> Iterator[None]:
    """Have a busy process in the block."""
    process = multiprocessing.get_context("spawn").Process(target=keep_busy, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def measure(servers: Mapping[str, Generate], repeats: int) -> dict[str, Samples]:
    """Ask the servers in turns; return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(repeats):
        for name, generate in servers.items():
            start = time.perf_counter()
            generate(CALL)
            seconds[name].append(time.perf_counter() - start)
    return {name: Samples(tuple(values), "s") for name, values in seconds.items()}


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    report = Report("neighbour", "A busy neighbour, demo size", "python -m benchmarks.neighbour")
    with tempfile.TemporaryDirectory(prefix="neighbour-") as folder, ExitStack() as stack:
        repository = export_new_checkpoint(Path(folder))
        servers = {}
        for name, variables in SETTINGS.items():
            with environment(variables):
                servers[name] = served(repository, stack)
        measure(servers, 1)  # warm up
        alone = measure(servers, arguments.repeats)
        with neighbour():
            beside = measure(servers, arguments.repeats)
    report.measurements.update(
        alone={name: samples.values for name, samples in alone.items()},
        beside={name: samples.values for name, samples in beside.items()},
    )
    report.add(
        Table(
            "One request of 2.56 s and 20 steps",
            ("setting", "alone", "beside a process that keeps a core busy"),
            tuple((name, str(alone[name]), str(beside[name])) for name in SETTINGS),
        )
    )
    report.save()


if __name__ == "__main__":
    main()
