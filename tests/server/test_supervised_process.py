"""What runs when a server stops is answered and not cut off; its log is bounded, and can be read all the same."""

import os
import threading
import time

import numpy as np
import pytest
import tritonclient.grpc

from server import process
from server.installation import find_installation
from server.process import SupervisedProcess
from server.workspace import create_workspace
from tests.helpers import tiny_repository as tiny
from tests.helpers import waiting
from tests.helpers.unkept_server import UnkeptServer

# A model with requests that have no end, which answers them as `unet` does.
ENDLESS_CODE = """
import os
import threading
import time
from pathlib import Path

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        start = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
        namespace = Path("/proc/self/ns/pid").stat().st_ino
        self.board = Path(f"/dev/shm/audioldm2_jobs_{namespace}_{os.getppid()}_{start}_endless")
        self.board.mkdir(mode=0o700)
        self.senders = []
        threading.Thread(target=self.answer_at_the_stop, daemon=True).start()

    def execute(self, requests):
        self.senders += [request.get_response_sender() for request in requests]
        (self.board / f"running{len(self.senders)}").touch()
        return [None] * len(requests)

    def answer_at_the_stop(self):
        while not (self.board / "stop").exists():
            time.sleep(0.05)
        error = pb_utils.TritonError("[UNAVAILABLE] the server is stopping", pb_utils.TritonError.UNAVAILABLE)
        for sender in self.senders:
            sender.send(
                pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            )
"""
CONFIG = tiny.tensors("TYPE_FP32 dims: [ 1 ]", "TYPE_FP32 dims: [ 1 ]")
NUM_REQUESTS = 8
STOP_TIMEOUT_S = 4
LINE = "x" * 97


@pytest.mark.server
def test_requests_without_an_end_are_all_answered_before_the_stop_timeout(tmp_path):
    tiny.add_python_model(tmp_path, "endless", ENDLESS_CODE, CONFIG)
    answers = []
    with UnkeptServer(tmp_path, ready_timeout_s=60, stop_timeout_s=STOP_TIMEOUT_S) as server:
        threads = [threading.Thread(target=lambda: answers.append(ask(server.grpc_url))) for _ in range(NUM_REQUESTS)]
        for thread in threads:
            thread.start()
        [board] = tiny.SHARED_MEMORY.glob(f"audioldm2_jobs_*_{server.pid}_*_endless")
        waiting.wait_until((board / f"running{NUM_REQUESTS}").exists, 10, "all requests run")
        start = time.monotonic()
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - start
        stopping.join()
    assert seconds < STOP_TIMEOUT_S
    assert answers == [("StatusCode.UNAVAILABLE", "[UNAVAILABLE] the server is stopping")] * NUM_REQUESTS
    assert not board.exists()


def ask(address: str) -> tuple[str, str]:
    with tritonclient.grpc.InferenceServerClient(address) as client:
        tensor = tritonclient.grpc.InferInput("x", [1], "FP32")
        tensor.set_data_from_numpy(np.zeros(1, np.float32))
        with pytest.raises(tritonclient.grpc.InferenceServerException) as error:
            client.infer("endless", [tensor])
        return str(error.value.status()), str(error.value.message())


@pytest.mark.server
def test_a_log_of_many_megabytes_is_bounded_and_followed_to_its_end():
    """A shell that writes 60 MB stands for a tritonserver that does so in a year."""
    place = create_workspace(find_installation())
    child = SupervisedProcess(
        ["/bin/sh", "-c", f"yes {LINE} | head -n 600000; echo the end; sleep 60"],
        environment=os.environ,
        current_directory=place.current_directory,
        workspace=place.root,
        log=place.log,
        shared_memory_prefix="triton_python_backend_shm_region_none",
        shared_memory_folders="",
        stop_timeout_s=1,
    )
    try:
        lines = ""

        def has_ended() -> bool:
            nonlocal lines
            lines += child.new_log_lines()
            return lines.endswith("the end\n")

        waiting.wait_until(has_ended, 60, "the log is followed to its end")
        waiting.wait_until(lambda: place.log.stat().st_blocks * 512 < (17 << 20), 5, "the log's start is released")
        assert set(lines) <= set("x\nthe nd")
        text = child.log_text()
        assert text.endswith(f"{LINE}\nthe end\n")
        assert (7 << 20) < len(text) <= process.KEPT_LOG_BYTES
        assert text.startswith(f"{LINE}\n"), "the first line is incomplete"
    finally:
        child.close()
