"""How long a server takes to be ready, and to answer its first request, with cold and warm files.

`python -m benchmarks.startup`; a few minutes.
"""

import argparse
import tempfile
import time
from importlib.metadata import distribution
from pathlib import Path

from audioldm2_client import AudioLDM2Client

from benchmarks.page_cache import forget
from benchmarks.report import Report, Samples, Table
from benchmarks.repositories import export_new_checkpoint
from server import EmbeddedServer


def measure_start(repository: Path) -> dict[str, float]:
    """Start a server and generate twice; return the seconds of each."""
    start = time.perf_counter()
    with EmbeddedServer(repository) as server, AudioLDM2Client(server.grpc_url) as client:
        seconds = {"until ready": time.perf_counter() - start}
        for name in ("first request", "second request"):
            start = time.perf_counter()
            client.generate("a dog barking", audio_length_in_s=2.56, num_inference_steps=10, seed=0)
            seconds[name] = time.perf_counter() - start
    return seconds


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("demo", "full"), default="demo")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    command = f"python -m benchmarks.startup --size {arguments.size}"
    report = Report(f"startup_{arguments.size}", f"Startup, {arguments.size} size", command)
    installed = Path(str(distribution("torch").locate_file(".")))
    runs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        repository = export_new_checkpoint(Path(folder), arguments.size)
        for _ in range(arguments.repeats):
            forget(repository)
            forget(installed)
            runs["cold"].append(measure_start(repository))
            runs["warm"].append(measure_start(repository))
    report.measurements.update(runs)
    report.add(
        Table(
            "From the start of the process (2.56 s, 10 steps)",
            ("files", *runs["cold"][0]),
            tuple(
                (name, *(str(Samples(tuple(run[part] for run in way), "s")) for part in way[0]))
                for name, way in runs.items()
            ),
            note="Cold: the model repository and the Python packages are read from the disk.",
        )
    )
    report.save()


if __name__ == "__main__":
    main()
