"""What waiting threads cost: one request alone, and beside a process that keeps a core busy.

`python -m benchmarks.neighbour`; three minutes. It decides the default of GOMP_SPINCOUNT in `server/triton.env`: how
long OpenMP's threads wait actively for their next work.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.knobs import Setting, start
from benchmarks.load import Call, Generate
from benchmarks.report import Report, Samples, Table

CALL = Call(0.0, "a dog", 2.56, 20, seed=0)
SETTINGS = {
    f"`{name}={value}`": Setting(environment={name: value})
    for name, value in (
        ("OMP_WAIT_POLICY", "PASSIVE"),
        ("GOMP_SPINCOUNT", "1000"),
        ("GOMP_SPINCOUNT", "3000"),
        ("GOMP_SPINCOUNT", "10000"),
    )
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
            start_s = time.perf_counter()
            generate(CALL)
            seconds[name].append(time.perf_counter() - start_s)
    return {name: Samples(tuple(values), "s") for name, values in seconds.items()}


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    report = Report("neighbour", "A busy neighbour, demo size", "python -m benchmarks.neighbour")
    with tempfile.TemporaryDirectory(prefix="neighbour-") as folder, ExitStack() as stack:
        servers = start(Path(folder), SETTINGS, stack)
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
