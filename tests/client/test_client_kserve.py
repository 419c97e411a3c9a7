"""The protocol on the wire, compared with Triton's own client, which is independent of this one."""

import json

import numpy as np
import pytest
import tritonclient.http
from audioldm2_client import _kserve as kserve
from audioldm2_client import _kserve_grpc
from audioldm2_client._request import GenerationOptions, build_request
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import DescriptorProto
from tritonclient.grpc import service_pb2

OPTIONS = GenerationOptions(negative_prompt=["größer", ""], num_inference_steps=3, guidance_scale=2.5, seed=2**62)
REQUEST = build_request(["a dog", "犬\0"], OPTIONS, model_name="a b/c", request_id="r1", timeout_s=12.5)
TYPES = [
    ("BOOL", np.array([[True], [False]])),
    ("INT32", np.arange(6, dtype=np.int32).reshape(2, 3)),
    ("INT64", np.array([-(2**62)])),
    ("UINT8", np.array([], np.uint8)),
    ("FP16", np.array([0.5], np.float16)),
    ("FP32", np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 12)),
    ("BYTES", np.array([b"", b"a\0", "犬".encode()], np.object_)),
]


def of_tritonclient(inputs):
    for tensor in inputs:
        other = tritonclient.http.InferInput(tensor.name, list(tensor.data.shape), tensor.datatype)
        yield other.set_data_from_numpy(tensor.data)


def test_http_body_is_that_of_tritonclient():
    body, headers = kserve.build_body(REQUEST)
    expected, length = tritonclient.http.InferenceServerClient.generate_request_body(
        list(of_tritonclient(REQUEST.inputs)), request_id="r1", timeout=12_500_000
    )
    ours = int(headers["inference-header-content-length"])
    assert json.loads(body[:ours]) == json.loads(expected[:length])
    assert body[ours:] == expected[length:]


def test_model_name_is_quoted_in_a_path():
    assert kserve.infer_path("a b/c") == "/v2/models/a%20b%2Fc/infer"


def test_grpc_message_is_read_by_tritonclients_classes():
    message = service_pb2.ModelInferRequest.FromString(_kserve_grpc.build_message(REQUEST).SerializeToString())
    assert (message.model_name, message.id) == ("a b/c", "r1")
    assert message.parameters["timeout"].int64_param == 12_500_000
    assert [(i.name, i.datatype, list(i.shape)) for i in message.inputs] == [
        (tensor.name, tensor.datatype, list(tensor.data.shape)) for tensor in REQUEST.inputs
    ]
    body, headers = kserve.build_body(REQUEST)
    assert b"".join(message.raw_input_contents) == body[int(headers["inference-header-content-length"]) :]


def test_grpc_messages_have_the_fields_of_tritons_service():
    for name, fields in _kserve_grpc.MESSAGES.items():
        theirs = service_pb2.DESCRIPTOR.message_types_by_name[name.partition(".")[0]]
        for part in name.split(".")[1:]:
            theirs = theirs.nested_types_by_name[part]
        ours = fields_of(_kserve_grpc.POOL.FindMessageTypeByName(f"inference.{name}"))
        assert set(ours) == set(fields)
        for field_name, facts in ours.items():
            assert facts == fields_of(theirs)[field_name], f"{name}.{field_name}"


def fields_of(message: Descriptor) -> dict[str, tuple]:
    described = DescriptorProto()
    message.CopyToProto(described)
    return {field.name: (field.number, field.type, field.label, field.type_name) for field in described.field}


def test_grpc_paths_are_those_of_tritons_service():
    methods = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    paths = (_kserve_grpc.INFER, _kserve_grpc.MODEL_READY, _kserve_grpc.SERVER_LIVE)
    assert all(path.rpartition("/")[2] in methods for path in paths)
    assert {path.rpartition("/")[0] for path in paths} == {"/inference.GRPCInferenceService"}


def http_answer(tensors, **changes) -> tuple[bytes, dict[str, str]]:
    data = [serialize(array) for _, array in tensors]
    outputs = [
        {"name": str(i), "datatype": t, "shape": list(a.shape), "parameters": {"binary_data_size": len(d)}, **changes}
        for i, ((t, a), d) in enumerate(zip(tensors, data, strict=True))
    ]
    header = json.dumps({"outputs": outputs}).encode()
    return header + b"".join(data), {kserve.HEADER_LENGTH: str(len(header))}


def serialize(array: np.ndarray) -> bytes:
    if array.dtype == object:
        return b"".join(len(item).to_bytes(4, "little") + item for item in array)
    return array.tobytes()


def test_outputs_of_every_type_arrive_over_http_and_grpc():
    outputs = kserve.parse_body(*http_answer(TYPES))
    message = _kserve_grpc.ModelInferResponse()
    for index, (datatype, array) in enumerate(TYPES):
        message.outputs.add(name=str(index), datatype=datatype, shape=array.shape)
        message.raw_output_contents.append(serialize(array))
    for found in (outputs, _kserve_grpc.parse_message(message)):
        for index, (_, array) in enumerate(TYPES):
            assert found[str(index)].dtype == array.dtype
            np.testing.assert_array_equal(found[str(index)], array)


GOOD, HEADERS = http_answer(TYPES)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", {}),
        (b"<html>", {}),
        (b"[]", {}),
        (b"null", {}),
        (b'{"outputs": 1}', {}),
        (b'{"outputs": [{}]}', {}),
        (b"[" * 100_000, {}),
        (b"\xff\xfe", {}),
        (GOOD, {}),
        (GOOD[:-1], HEADERS),
        (GOOD + b"x", HEADERS),
        (GOOD, {kserve.HEADER_LENGTH: "x"}),
        (GOOD, {kserve.HEADER_LENGTH: "-1"}),
        (GOOD, {kserve.HEADER_LENGTH: str(2**40)}),
        http_answer(TYPES[:1], shape=[3]),
        http_answer(TYPES[:1], shape=[-1, 2, -1]),
        http_answer(TYPES[:1], shape="x"),
        http_answer(TYPES[:1], datatype="FP8"),
        http_answer(TYPES[:1], datatype=None),
        http_answer(TYPES[:1], datatype="BYTES"),
        http_answer(TYPES[:1], parameters={"binary_data_size": -1}),
        http_answer(TYPES[:1], parameters={"binary_data_size": "2"}),
        http_answer(TYPES[:1], parameters={}),
    ],
)
def test_body_that_breaks_the_protocol_is_one_error(body, headers):
    with pytest.raises(kserve.ProtocolError):
        kserve.parse_body(body, headers)


def test_message_that_contradicts_itself_is_one_error():
    message = _kserve_grpc.ModelInferResponse(raw_output_contents=[b"x"])
    with pytest.raises(kserve.ProtocolError):
        _kserve_grpc.parse_message(message)


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b'{"error": 1}', b"<html>", b"\xff", b"[" * 100_000])
def test_error_that_is_not_tritons_has_no_words(body):
    assert kserve.parse_error(body) is None
