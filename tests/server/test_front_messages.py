"""What the front reads before Triton sees it: paths, JSON, ModelInferRequest."""

import json
import struct

import pytest
from tritonclient.grpc import service_pb2

from server.front import grpc_inference, http_inference
from server.front.inference import check_shape, new_id
from server.front.refusals import RefusedError
from server.front.targets import Access, Kind

PUBLIC = Access(frozenset({"audioldm2", "jobs"}))
OPEN = Access(frozenset({"audioldm2", "jobs"}), exposes_internals=True)


def drawn(_model: str, in_message: str) -> str:
    return in_message or "drawn"


def infer(body: bytes, header_length: str | None = None) -> http_inference.Inference:
    return http_inference.read_inference(body, "audioldm2", header_length, drawn)


def tensor(**fields: object) -> bytes:
    return json.dumps({"inputs": [{"name": "seed", "datatype": "INT64", "data": [1], **fields}]}).encode()


def grpc_body(message: service_pb2.ModelInferRequest, compressed: bool = False) -> bytes:
    content = message.SerializeToString()
    return struct.pack(">?I", compressed, len(content)) + content


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/v2", Kind.SERVER),
        ("GET", "/v2/health/live", Kind.SERVER),
        ("GET", "/v2/health/ready", Kind.SERVER_READY),
        ("GET", "/v2/models/audioldm2", Kind.HTTP_MODEL),
        ("GET", "/v2/models/audioldm2/versions/1/ready", Kind.HTTP_MODEL),
        ("POST", "/v2/models/audioldm2/infer", Kind.HTTP_INFER),
        ("POST", "/v2/models/jobs/generate", Kind.HTTP_GENERATE),
        ("POST", "/v2/models/audioldm2/versions/1/generate_stream?x=1", Kind.HTTP_GENERATE),
    ],
)
def test_what_the_contract_names_can_be_reached(method, path, kind):
    assert PUBLIC.http_target(method, path).kind is kind


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v2/models/vae/infer", 404),
        ("GET", "/v2/models/unet/ready", 404),
        ("GET", "/v2/models/audioldm2/config", 404),
        ("GET", "/v2/models/audioldm2/stats", 404),
        ("GET", "/v2/models/stats", 404),
        ("POST", "/v2/repository/index", 404),
        ("POST", "/v2/repository/models/audioldm2/unload", 404),
        ("POST", "/v2/systemsharedmemory/region/x/register", 404),
        ("GET", "/v2/systemsharedmemory/status", 404),
        ("POST", "/v2/logging", 404),
        ("POST", "/v2/trace/setting", 404),
        ("POST", "/v2/models/audioldm2/trace/setting", 404),
        ("GET", "/metrics", 404),
        ("GET", "/", 404),
        ("GET", "//v2/models/vae", 404),
        ("GET", "/v2/models/audioldm2/../vae", 404),
        ("POST", "/v2/models/audioldm2\n/infer", 404),
        ("POST", "/v2/models/audioldm2/versions/0/infer", 404),
        ("PUT", "/v2/models/audioldm2/infer", 405),
        ("POST", "/v2/health/ready", 405),
        ("GET", "/v2/models/audioldm2/infer", 405),
    ],
)
def test_nothing_else_can_be_reached(method, path, status):
    with pytest.raises(RefusedError) as refused:
        PUBLIC.http_target(method, path)
    assert refused.value.code.http == status


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("/inference.GRPCInferenceService/ModelInfer", Kind.GRPC_INFER),
        ("/inference.GRPCInferenceService/ModelReady", Kind.GRPC_MODEL),
        ("/inference.GRPCInferenceService/ModelMetadata", Kind.GRPC_MODEL),
        ("/inference.GRPCInferenceService/ServerReady", Kind.SERVER_READY),
        ("/inference.GRPCInferenceService/ServerLive", Kind.SERVER),
        ("/grpc.health.v1.Health/Check", Kind.SERVER_READY),
    ],
)
def test_calls_that_the_contract_names_can_be_reached(method, kind):
    assert PUBLIC.grpc_target(method).kind is kind


INTERNAL_CALLS = [
    *("RepositoryIndex", "RepositoryModelLoad", "ModelStatistics", "ModelConfig", "LogSettings", "TraceSetting"),
    *("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "CudaSharedMemoryRegister"),
]


@pytest.mark.parametrize("call", INTERNAL_CALLS)
def test_internal_calls_are_reached_only_where_they_are_exposed(call):
    with pytest.raises(RefusedError, match="can't be reached"):
        PUBLIC.grpc_target(f"/inference.GRPCInferenceService/{call}")
    assert OPEN.grpc_target(f"/inference.GRPCInferenceService/{call}").kind is Kind.INTERNAL


@pytest.mark.parametrize("access", [PUBLIC, OPEN])
def test_streams_are_never_let_through(access):
    with pytest.raises(RefusedError, match="streams"):
        access.grpc_target("/inference.GRPCInferenceService/ModelStreamInfer")


def test_exposed_internals_are_reached_over_http():
    assert OPEN.http_target("POST", "/v2/models/vae/infer").kind is Kind.HTTP_INFER
    assert OPEN.http_target("POST", "/v2/repository/index").kind is Kind.INTERNAL


def test_a_refusal_says_which_models_there_are_and_not_whether_that_one_exists():
    sentences = []
    for model in ("vae", "nonsense"):
        with pytest.raises(RefusedError) as refused:
            PUBLIC.check_model(model)
        sentences.append(refused.value.sentence.replace(model, "MODEL"))
    assert sentences == ["Request for unknown model: 'MODEL' is not found; there are audioldm2, jobs."] * 2


@pytest.mark.parametrize("depth", [17, 1000, 60_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_deep_json_is_refused(depth, brackets):
    opening = '{"a":' if brackets == "{}" else "["
    body = b'{"prompt":' + opening.encode() * depth + b"1" + brackets[1].encode() * depth + b"}"
    with pytest.raises(RefusedError, match="deeper than 16"):
        http_inference.read_generate(body, "audioldm2", drawn)


def test_json_as_deep_as_a_tensor_passes():
    body = tensor(shape=[1, 1, 1, 1], data=[[[[1]]]])
    assert json.loads(infer(body).body)["inputs"][0]["data"] == [[[[1]]]]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"null", b"1", b"{", b"\xff", b'{"a": "\xff"}', b"\x1f\x8b\x08"),
        *(b'{"a": 1} x', b"{'a': 1}", b'{"a": ' + b"9" * 5000 + b"}"),
    ],
)
def test_what_is_not_a_json_object_is_refused(body):
    with pytest.raises(RefusedError) as refused:
        http_inference.read_generate(body, "audioldm2", drawn)
    assert refused.value.code.http == 400


@pytest.mark.parametrize(
    "shape",
    [
        *([2**40], [10**9], [-1], [-(2**40), 2**40], [1.0], ["1"], [True], [None], [[1]], "1", None, {}, 1),
        *([2**32] * 4, [2**32, 2**32], [2**63], [2**64], [0, 2**40], [10**30], [1] * 9),
    ],
)
def test_a_shape_that_the_message_cannot_hold_is_refused(shape):
    with pytest.raises(RefusedError):
        infer(tensor(shape=shape))


@pytest.mark.parametrize("shape", [[], [1], [0], [2, 3], [1] * 8])
def test_an_ordinary_shape_passes(shape):
    assert infer(tensor(shape=shape))


@pytest.mark.parametrize("shape", [[2**32] * 4, [2**62], [-1], [1] * 9, [2**32, 2**32, 2**32, 0]])
def test_a_shape_that_a_grpc_message_cannot_hold_is_refused(shape):
    message = service_pb2.ModelInferRequest(model_name="vae", raw_input_contents=[b""])
    message.inputs.add(name="latents", datatype="FP32", shape=shape)
    with pytest.raises(RefusedError, match="input 'latents'"):
        grpc_inference.read_inference(grpc_body(message), drawn)


def test_zero_sizes_hide_nothing():
    with pytest.raises(RefusedError, match="elements"):
        check_shape("x", [0, 2**40], 100)


@pytest.mark.parametrize("key", ["inputs", "outputs"])
def test_tensors_in_shared_memory_are_refused(key):
    parameters = {"shared_memory_region": "audioldm2_x", "shared_memory_byte_size": 4}
    body = json.dumps({key: [{"name": "seed", "shape": [1], "parameters": parameters}]}).encode()
    with pytest.raises(RefusedError, match="shared memory"):
        infer(body)
    message = service_pb2.ModelInferRequest(model_name="audioldm2")
    getattr(message, key).add(name="seed").parameters["shared_memory_region"].string_param = "audioldm2_x"
    with pytest.raises(RefusedError, match="shared memory"):
        grpc_inference.read_inference(grpc_body(message), drawn)


@pytest.mark.parametrize(
    "body",
    [
        *(b'{"inputs": 1}', b'{"inputs": [1]}', b'{"inputs": [{"name": "a"}]}', b'{"outputs": {}}', b'{"id": 7}'),
        b'{"inputs": [{"name": "a", "shape": [1], "parameters": []}]}',
    ],
)
def test_an_inference_of_another_form_is_refused(body):
    with pytest.raises(RefusedError):
        infer(body)


@pytest.mark.parametrize("length", ["-1", "1000000", "x", "", "1e2", "0x10", "9" * 30, "²"])
def test_a_wrong_header_length_is_refused(length):
    with pytest.raises(RefusedError, match="Inference-Header-Content-Length"):
        infer(tensor(shape=[1]), length)


def test_what_two_parsers_would_read_differently_is_refused():
    body = b'{"inputs": [{"name": "seed", "shape": [1099511627776], "shape": [1], "data": [1]}]}'
    with pytest.raises(RefusedError, match="'shape' already exists"):
        infer(body)


def test_triton_gets_json_that_was_written_anew():
    body = b' { "inputs" : [ {"n\\u0061me": "seed", "shape": [ 1 ], "data": [1e0]} ] } '
    expected = b'{"inputs":[{"name":"seed","shape":[1],"data":[1.0]}],"id":"drawn"}'
    assert infer(body).body == expected


def test_binary_tensors_follow_the_json_that_was_written_anew():
    head = tensor(shape=[1], parameters={"binary_data_size": 8})
    read = infer(head + bytes(range(8)), str(len(head)))
    assert read.json_length is not None
    assert read.body[read.json_length :] == bytes(range(8))
    assert json.loads(read.body[: read.json_length])["id"] == "drawn"


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"\0\0\0\0", b"\0\0\0\0\x05abc", b"\0\0\0\0\x02\xff\xff", b"\0\0\0\0\0\0\0\0\0\0"),
        b"\0" + struct.pack(">I", 4) + b"\x0a\xff\xff\x01",
    ],
)
def test_what_is_not_one_grpc_message_is_refused(body):
    with pytest.raises(RefusedError) as refused:
        grpc_inference.read_inference(body, drawn)
    assert refused.value.code.tag == "INVALID_ARG"


def test_a_compressed_message_is_refused():
    message = service_pb2.ModelInferRequest(model_name="audioldm2")
    with pytest.raises(RefusedError, match="compressed"):
        grpc_inference.read_inference(grpc_body(message, compressed=True), drawn)


def test_the_id_of_a_caller_is_kept_and_a_missing_one_drawn():
    message = service_pb2.ModelInferRequest(model_name="audioldm2")
    assert grpc_inference.read_inference(grpc_body(message), drawn).request_id == "drawn"
    message.id = "mine"
    read = grpc_inference.read_inference(grpc_body(message), drawn)
    assert read.request_id == "mine"
    assert service_pb2.ModelInferRequest.FromString(read.body[5:]).id == "mine"
    assert infer(b'{"id": "mine", "inputs": []}').request_id == "mine"
    assert infer(b'{"inputs": []}').request_id == "drawn"
    assert len({new_id() for _ in range(100)}) == 100


@pytest.mark.parametrize(("timeout", "seconds"), [(1_500_000, 1.5), (0, None), (None, None), (2**63 - 1, None)])
def test_the_timeout_is_read(timeout, seconds):
    assert infer(json.dumps({"inputs": [], "parameters": {"timeout": timeout}}).encode()).timeout_s == seconds


@pytest.mark.parametrize("timeout", [-1, "1", 1.5, True, 2**63, 10**400, [], {}])
def test_a_timeout_that_is_none_is_refused(timeout):
    with pytest.raises(RefusedError, match="timeout must be a whole number of microseconds"):
        infer(json.dumps({"inputs": [], "parameters": {"timeout": timeout}}).encode())
    with pytest.raises(RefusedError, match="timeout must be a whole number of microseconds"):
        http_inference.read_generate(json.dumps({"timeout": timeout}).encode(), "audioldm2", drawn)


def test_a_negative_timeout_is_refused_in_a_message_too():
    message = service_pb2.ModelInferRequest(model_name="audioldm2")
    message.parameters["timeout"].int64_param = -1
    with pytest.raises(RefusedError, match="got -1"):
        grpc_inference.read_inference(grpc_body(message), drawn)


@pytest.mark.parametrize(
    ("request_id", "problem"),
    [("\ud800", "surrogate"), ("a" * 1025, "at most 1024 bytes, got 1025"), ("é" * 513, "1026")],
)
def test_an_id_that_cannot_be_sent_back_is_refused(request_id, problem):
    with pytest.raises(RefusedError, match=problem):
        infer(json.dumps({"id": request_id, "inputs": []}).encode())


def test_a_size_beyond_all_floats_is_refused_in_a_sentence():
    with pytest.raises(RefusedError, match=r"more than 1e\+300 elements"):
        infer(tensor(shape=[10**400]))


def test_tensors_that_are_too_large_together_are_refused():
    inputs = [{"name": f"x{number}", "datatype": "INT64", "shape": [100], "data": [1]} for number in range(100)]
    with pytest.raises(RefusedError, match="the shapes up to 'x"):
        infer(json.dumps({"inputs": inputs}).encode())
    message = service_pb2.ModelInferRequest(model_name="audioldm2")
    for tensor_ in inputs:
        message.inputs.add(name=tensor_["name"], datatype="INT64", shape=tensor_["shape"])
    with pytest.raises(RefusedError, match="the shapes up to 'x"):
        grpc_inference.read_inference(grpc_body(message), drawn)


def test_more_parameters_than_are_of_use_are_refused():
    many = {f"p{number}": 1 for number in range(65)}
    message = service_pb2.ModelInferRequest(model_name="audioldm2")
    for name in many:
        message.parameters[name].int64_param = 1
    for read in (
        lambda: infer(json.dumps({"inputs": [], "parameters": many}).encode()),
        lambda: infer(tensor(shape=[1], parameters=many)),
        lambda: http_inference.read_generate(json.dumps(many).encode(), "audioldm2", drawn),
        lambda: grpc_inference.read_inference(grpc_body(message), drawn),
    ):
        with pytest.raises(RefusedError, match=r"at most 64 .* got 65"):
            read()


@pytest.mark.parametrize("value", [True, False, 0])
def test_only_the_front_says_that_triton_has_dropped_a_request(value):
    fields = {"dropped_by_triton": value}
    message = service_pb2.ModelInferRequest(model_name="jobs")
    message.parameters["dropped_by_triton"].bool_param = bool(value)
    for read in (
        lambda: infer(json.dumps({"inputs": [], "parameters": fields}).encode()),
        lambda: http_inference.read_generate(json.dumps(fields).encode(), "jobs", drawn),
        lambda: http_inference.read_generate(json.dumps({"parameters": fields}).encode(), "jobs", drawn),
        lambda: grpc_inference.read_inference(grpc_body(message), drawn),
    ):
        with pytest.raises(RefusedError, match="there is no parameter dropped_by_triton"):
            read()


@pytest.mark.parametrize("name", ["", "\0", "timeout\0x"])
def test_names_that_triton_reads_otherwise_are_refused(name):
    for body in ({name: 1}, {"parameters": {name: 1}}):
        with pytest.raises(RefusedError, match="name of a field"):
            http_inference.read_generate(json.dumps(body).encode(), "audioldm2", drawn)


def test_a_path_of_http_is_none_of_grpc_whatever_is_exposed():
    with pytest.raises(RefusedError, match="can't be reached"):
        OPEN.grpc_target("/v2/models/vae/infer")


@pytest.mark.parametrize("body", [b"", b"\0\0\0\0", b"\0\0\0\0\5", b"\1\0\0\0\0", b"\0\0\0\0\0\0"])
def test_a_call_that_says_nothing_must_be_one_message(body):
    with pytest.raises(RefusedError):
        grpc_inference.check_message(body)
    grpc_inference.check_message(b"\0\0\0\0\0")
