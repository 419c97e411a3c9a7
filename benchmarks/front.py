"""What the front costs: the same requests through it and to Triton itself, in turns in one run.

`python -m benchmarks.front`; about five minutes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from audioldm2_client import AudioLDM2Client

from benchmarks.report import Report, Samples, Table
from benchmarks.repositories import copy_with, export_new_checkpoint, refuse_nothing
from server import EmbeddedServer

FRONT, BARE = "through the front", "Triton itself"
ROUNDS = 5
CLIENTS = 16

Call = Callable[[AudioLDM2Client], object]


def shortest(client: AudioLDM2Client) -> object:
    """One step of the shortest audio."""
    return client.generate("rain", num_inference_steps=1, audio_length_in_s=0.16, seed=1)


def long_answer(client: AudioLDM2Client) -> object:
    """One step, and 640 kB of audio."""
    return client.generate("rain", num_inference_steps=1, audio_length_in_s=10.0, seed=1)


def is_ready(client: AudioLDM2Client) -> object:
    """No model computes."""
    return client.is_ready()


CALLS: dict[str, tuple[Call, int]] = {
    "readiness of server and ensemble": (is_ready, 100),
    "1 step, 0.16 s": (shortest, 30),
    "1 step, 10 s": (long_answer, 3),
}


def compare(clients: dict[str, AudioLDM2Client], call: Call, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each way's calls, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in clients}
    for client in clients.values():
        call(client)
    for _ in range(repeats):
        for name, client in clients.items():
            start = time.perf_counter()
            call(client)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def throughput(client: AudioLDM2Client, count: int) -> float:
    """Return answers per second with CLIENTS clients."""
    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda _: shortest(client), range(count)))
    return count / (time.perf_counter() - start)


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    report = Report("front", "The front", "python -m benchmarks.front")
    rows, loads = [], []
    with tempfile.TemporaryDirectory(prefix="front-") as folder, ExitStack() as stack:
        repository = copy_with(export_new_checkpoint(Path(folder)), Path(folder) / "copy", refuse_nothing())
        servers = {
            FRONT: stack.enter_context(EmbeddedServer(repository)),
            BARE: stack.enter_context(EmbeddedServer(repository, front=False)),
        }
        for protocol in ("gRPC", "HTTP"):
            clients = {
                name: stack.enter_context(
                    AudioLDM2Client(server.grpc_url if protocol == "gRPC" else f"http://{server.http_url}")
                )
                for name, server in servers.items()
            }
            for name, (call, repeats) in CALLS.items():
                rounds = [compare(clients, call, repeats) for _ in range(ROUNDS)]
                report.measurements[f"{protocol}, {name}"] = rounds
                rows.append((protocol, name, *_row(rounds)))
            rates = [{name: throughput(client, 64) for name, client in clients.items()} for _ in range(ROUNDS)]
            report.measurements[f"{protocol}, {CLIENTS} clients"] = rates
            ratio = Samples(tuple(rate[FRONT] / rate[BARE] for rate in rates), "x")
            loads.append((protocol, *(str(Samples(tuple(r[n] for r in rates), "/s")) for n in clients), str(ratio)))
    report.add(
        Table(
            "One request at a time",
            ("protocol", "request", FRONT, BARE, "difference"),
            tuple(rows),
            note="Each figure is the median of the medians of several rounds, with their range.",
        )
    )
    report.add(Table(f"{CLIENTS} clients, 1 step, 0.16 s", ("protocol", FRONT, BARE, "ratio"), tuple(loads)))
    report.save()


def _row(rounds: list[dict[str, list[float]]]) -> list[str]:
    medians = [{name: 1000 * statistics.median(values) for name, values in one.items()} for one in rounds]
    ways = [str(Samples(tuple(one[name] for one in medians), "ms")) for name in (FRONT, BARE)]
    return [*ways, str(Samples(tuple(one[FRONT] - one[BARE] for one in medians), "ms"))]


if __name__ == "__main__":
    main()
