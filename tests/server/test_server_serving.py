"""A running embedded server answers as Triton with its native ONNX Runtime backend would."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from server import EmbeddedServer
from tests.helpers import tiny_repository as tiny

pytestmark = pytest.mark.server

WHEREABOUTS = """
import os
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        facts = [os.path.realpath(np.__file__), os.getcwd(), str(len(os.listdir()))]
        tensor = pb_utils.Tensor("y", np.array([os.fsencode(fact) for fact in facts], dtype=object))
        return [pb_utils.InferenceResponse([tensor]) for _ in requests]
"""
WHEREABOUTS_CONFIG = """input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "y" data_type: TYPE_STRING dims: [ -1 ] }
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("repository")
    tiny.add_double(repository)
    tiny.add_onnx_model(repository, "lookup", tiny.lookup_graph(), tiny.LOOKUP_CONFIG)
    tiny.add_onnx_model(repository, "lonely_lookup", tiny.lookup_graph(), tiny.LOOKUP_CONFIG.split("dynamic")[0])
    tiny.add_onnx_model(repository, "strings", tiny.string_graph(), tiny.STRING_CONFIG)
    tiny.add_python_model(repository, "whereabouts", WHEREABOUTS, WHEREABOUTS_CONFIG)
    floats = tiny.tensors("TYPE_FP32 dims: [ -1, 3 ]", "TYPE_FP32 dims: [ -1, 3 ]")
    tiny.add_chain(repository, "quadruple", floats, [("double", "x=x", "y=mid"), ("double", "x=mid", "y=y")])
    indices = tiny.tensors("TYPE_INT64 dims: [ -1, 1 ]", "TYPE_FP32 dims: [ -1, 3 ]")
    tiny.add_chain(
        repository, "doubled_lookup", indices, [("lonely_lookup", "index=x", "y=mid"), ("double", "x=mid", "y=y")]
    )
    with EmbeddedServer(repository, ready_timeout_s=60, stop_timeout_s=10, expose_internals=True) as running:
        yield running


@pytest.fixture
def grpc(server):
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
    yield client
    client.close()


@pytest.fixture
def http(server):
    client = tritonclient.http.InferenceServerClient(server.http_url)
    yield client
    client.close()


def tensor(module, name, array):
    wire_type = {"f": "FP32", "i": "INT64", "O": "BYTES"}[array.dtype.kind]
    result = module.InferInput(name, list(array.shape), wire_type)
    result.set_data_from_numpy(array)
    return result


def look_up(client, model, index):
    return client.infer(model, [tensor(tritonclient.grpc, "index", np.array([[index]]))], client_timeout=30)


def test_a_model_answers_alike_over_grpc_and_http(grpc, http):
    x = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)
    over_grpc = grpc.infer("double", [tensor(tritonclient.grpc, "x", x)]).as_numpy("y")
    over_http = http.infer("double", [tensor(tritonclient.http, "x", x)]).as_numpy("y")
    np.testing.assert_array_equal(over_grpc, 2 * x)
    np.testing.assert_array_equal(over_http, 2 * x)


def test_concurrent_requests_run_as_one_batch_and_get_their_own_rows(grpc):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda index: look_up(grpc, "lookup", index), range(4)))
    for index, answer in enumerate(answers):
        assert answer.as_numpy("rows").tolist() == [[4]], "the four requests did not share a batch"
        assert answer.as_numpy("y").tolist() == [[3 * index, 3 * index + 1, 3 * index + 2]]


def test_a_bad_request_fails_alone_in_its_batch(grpc):
    def attempt(index):
        try:
            return look_up(grpc, "lookup", index).as_numpy("y").tolist()
        except InferenceServerException as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(attempt, (1, 99, 3, 4)))
    assert isinstance(answers[1], InferenceServerException)
    assert answers[1].status() == "StatusCode.INVALID_ARGUMENT"
    assert "99" in answers[1].message()
    assert [answers[0], answers[2], answers[3]] == [[[3, 4, 5]], [[9, 10, 11]], [[12, 13, 14]]]


def test_an_ensemble_of_two_onnx_models_answers(grpc):
    x = np.array([[1, 2, 3]], dtype=np.float32)
    answer = grpc.infer("quadruple", [tensor(tritonclient.grpc, "x", x)])
    np.testing.assert_array_equal(answer.as_numpy("y"), 4 * x)


def test_a_models_error_leaves_its_ensemble_with_its_code_and_message(grpc):
    with pytest.raises(InferenceServerException) as caught:
        grpc.infer("doubled_lookup", [tensor(tritonclient.grpc, "x", np.array([[99]]))])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert caught.value.message().startswith("in ensemble 'doubled_lookup', ")
    assert "99" in caught.value.message()


def test_only_the_requested_output_is_sent(grpc):
    wanted = [tritonclient.grpc.InferRequestedOutput("rows")]
    answer = grpc.infer("lonely_lookup", [tensor(tritonclient.grpc, "index", np.array([[2]]))], outputs=wanted)
    assert [output.name for output in answer.get_response().outputs] == ["rows"]


def test_strings_and_scalars_pass_through_a_graph(grpc):
    words = np.array([b"a dog barking", "Glück".encode()], dtype=object)
    answer = grpc.infer("strings", [tensor(tritonclient.grpc, "x", words)])
    assert answer.as_numpy("y").tolist() == words.tolist()
    assert answer.as_numpy("size").tolist() == [2]


def test_a_python_model_sees_this_environments_packages_from_an_empty_folder(grpc):
    answer = grpc.infer("whereabouts", [tensor(tritonclient.grpc, "x", np.zeros(1, dtype=np.float32))])
    numpy, folder, entries = answer.as_numpy("y").tolist()
    assert Path(os.fsdecode(numpy)) == Path(np.__file__).resolve()
    assert Path(folder.decode()) != Path.cwd()
    assert entries == b"0"


def test_every_endpoint_listens_on_loopback_only(server):
    ports = {int(url.rsplit(":", 1)[1]) for url in (server.http_url, server.grpc_url, server.metrics_url)}
    assert listening_addresses(descendants(os.getpid()), ports) == {("127.0.0.1", port) for port in ports}
    assert listening_addresses([server.pid]) == set(), "Triton itself is behind sockets that only this user reaches"


def test_metrics_stay_on_loopback_wherever_the_host_is(tmp_path):
    tiny.add_double(tmp_path)
    with EmbeddedServer(tmp_path, host="127.0.0.2", ready_timeout_s=60, stop_timeout_s=10) as other:
        http, grpc, metrics = (
            int(url.rsplit(":", 1)[1]) for url in (other.http_url, other.grpc_url, other.metrics_url)
        )
        found = listening_addresses(descendants(os.getpid()), {http, grpc, metrics})
    assert found == {("127.0.0.2", http), ("127.0.0.2", grpc), ("127.0.0.1", metrics)}


def test_the_log_tells_nothing_of_a_missing_gpu_to_its_reader(server):
    from server.triton_log import tail

    assert "successfully loaded 'double'" in tail(server.log_text())
    if not Path("/dev/nvidiactl").exists():
        assert "CUDA driver version" in server.log_text()
        assert "CUDA driver version" not in tail(server.log_text(), 1000)


def descendants(pid: int) -> list[int]:
    """A process's children, their children and so on."""
    children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def listening_addresses(pids: list[int], ports: set[int] | None = None) -> set[tuple[str, int]]:
    """(address, port) of the listening sockets of some processes, on some ports or on all."""
    inodes = {
        str(entry.readlink()) for pid in pids for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()
    }
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes and (ports is None or int(port, 16) in ports):
                found.add((readable(address), int(port, 16)))
    return found


def readable(address: str) -> str:
    """An address from the kernel's hexadecimal; an IPv6 one stays as it is, unless it stands for an IPv4 one."""
    mapped = address.removeprefix("0000000000000000FFFF0000")
    return socket.inet_ntoa(bytes.fromhex(mapped)[::-1]) if len(mapped) == 8 else address
