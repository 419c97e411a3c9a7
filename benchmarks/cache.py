"""What Triton's response cache saves, and what a hit costs in memory: the bundled server leaks with it.

`python -m benchmarks.cache`; a few minutes.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc
from audioldm2_client import AudioLDM2Client
from tritonclient.grpc import InferInput

from benchmarks.process_memory import TreeMemory
from benchmarks.report import Report, Samples, Table
from benchmarks.repositories import export_new_checkpoint
from server import EmbeddedServer

CACHE = "--cache-config=local,size=67108864"
TOKENS = 16
SERVER_PROCESS = "tritonserver"


def measure_hits(server: EmbeddedServer, count: int) -> dict[str, float]:
    """Ask text_encoder the same thing `count` times; return the seconds of a call and what tritonserver grew by."""
    ids = np.arange(4, 4 + TOKENS, dtype=np.int64)[None]
    inputs = []
    for name in ("clap_input_ids", "clap_attention_mask", "t5_input_ids", "t5_attention_mask"):
        inputs.append(InferInput(name, ids.shape, "INT64"))
        inputs[-1].set_data_from_numpy(np.ones_like(ids) if name.endswith("mask") else ids)
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        for _ in range(1000):  # until its buffers have their size
            client.infer("text_encoder", inputs)
        before = _server_memory(server)
        start = time.perf_counter()
        for _ in range(count):
            client.infer("text_encoder", inputs)
        seconds = (time.perf_counter() - start) / count
    return {"seconds": seconds, "bytes_per_call": (_server_memory(server) - before) * 2**20 / count}


def measure_answers(server: EmbeddedServer, repeats: int) -> list[float]:
    """Ask the cached ensemble the same thing again and again; return the seconds of each time after the first."""
    seconds = []
    with AudioLDM2Client(server.grpc_url, model_name="audioldm2_cached") as client:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            client.generate("a dog barking", audio_length_in_s=2.56, num_inference_steps=10, seed=0)
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _server_memory(server: EmbeddedServer) -> float:
    memory = TreeMemory(server.pid)
    memory.now()
    return memory.peak_of[SERVER_PROCESS]


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    report = Report("cache", "Response cache, demo size", "python -m benchmarks.cache")
    rows = []
    with tempfile.TemporaryDirectory(prefix="cache-") as folder:
        repository = export_new_checkpoint(Path(folder))
        for name, options in {"no cache": (), "cache": (CACHE,)}.items():
            with EmbeddedServer(repository, extra_arguments=options) as server:
                hits = measure_hits(server, arguments.calls)
                answers = measure_answers(server, arguments.repeats)
            report.measurements[name] = {**hits, "answers": answers}
            rows.append(
                (
                    name,
                    f"{1000 * hits['seconds']:.2f} ms",
                    f"{hits['bytes_per_call']:.0f} bytes",
                    str(Samples(tuple(answers), "s")),
                )
            )
    report.add(
        Table(
            "Equal requests",
            ("", "a call of text_encoder", "tritonserver grows per call by", "an answer of audioldm2_cached, 2.56 s"),
            tuple(rows),
            note=f"Over {arguments.calls} calls; the server is the bundled one.",
        )
    )
    report.save()


if __name__ == "__main__":
    main()
