"""The KServe v2 inference protocol over gRPC: its messages, as far as they are needed here. Pure.

https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto; a test compares the fields with
those of tritonclient. The messages are in a pool of their own, because tritonclient registers the same names, and are
made from descriptors, because generated code is bound to one major version of protobuf and the next.
"""

from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from audioldm2_client._kserve import Outputs, ProtocolError, decode_tensor, encode_tensor
from audioldm2_client._request import InferenceRequest

SERVICE = "/inference.GRPCInferenceService"
INFER = f"{SERVICE}/ModelInfer"
MODEL_READY = f"{SERVICE}/ModelReady"
SERVER_READY = f"{SERVICE}/ServerReady"
SERVER_LIVE = f"{SERVICE}/ServerLive"

# Type and number by name; "*" is a repeated field.
MESSAGES = {
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": ("bool", 1)},
    "ModelReadyRequest": {"name": ("string", 1)},
    "ModelReadyResponse": {"ready": ("bool", 1)},
    "InferParameter": {"int64_param": ("int64", 2)},
    "ModelInferRequest": {
        "model_name": ("string", 1),
        "id": ("string", 3),
        "parameters": ("*ModelInferRequest.ParametersEntry", 4),
        "inputs": ("*ModelInferRequest.InferInputTensor", 5),
        "raw_input_contents": ("*bytes", 7),
    },
    "ModelInferRequest.ParametersEntry": {"key": ("string", 1), "value": ("InferParameter", 2)},
    "ModelInferRequest.InferInputTensor": {
        "name": ("string", 1),
        "datatype": ("string", 2),
        "shape": ("*int64", 3),
    },
    "ModelInferResponse": {
        "outputs": ("*ModelInferResponse.InferOutputTensor", 5),
        "raw_output_contents": ("*bytes", 6),
    },
    "ModelInferResponse.InferOutputTensor": {
        "name": ("string", 1),
        "datatype": ("string", 2),
        "shape": ("*int64", 3),
    },
}


def _make_pool() -> DescriptorPool:
    file = FileDescriptorProto(name="grpc_service.proto", package="inference", syntax="proto3")
    made: dict[str, Any] = {}
    for full_name, fields in MESSAGES.items():
        parent, _, name = full_name.rpartition(".")
        made[full_name] = message = made[parent].nested_type.add() if parent else file.message_type.add()
        message.name = name
        message.options.map_entry = name.endswith("Entry")
        for field_name, (kind, number) in fields.items():
            field = message.field.add(name=field_name, number=number)
            field.label = FieldDescriptorProto.LABEL_REPEATED if kind[0] == "*" else FieldDescriptorProto.LABEL_OPTIONAL
            if (kind := kind.lstrip("*")) in MESSAGES:
                field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".inference.{kind}"
            else:
                field.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool


def _message_class(name: str) -> Any:
    return GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))


POOL = _make_pool()
ModelInferRequest = _message_class("ModelInferRequest")
ModelInferResponse = _message_class("ModelInferResponse")
ServerReadyRequest = _message_class("ServerReadyRequest")
ServerReadyResponse = _message_class("ServerReadyResponse")
ModelReadyRequest = _message_class("ModelReadyRequest")
ModelReadyResponse = _message_class("ModelReadyResponse")

# What a channel's `unary_unary` takes: how a request is written and an answer read.
INFER_CODECS = (ModelInferRequest.SerializeToString, ModelInferResponse.FromString)
SERVER_READY_CODECS = (ServerReadyRequest.SerializeToString, ServerReadyResponse.FromString)
MODEL_READY_CODECS = (ModelReadyRequest.SerializeToString, ModelReadyResponse.FromString)


def build_message(request: InferenceRequest) -> Any:
    """Return the `ModelInferRequest` of an inference."""
    message = ModelInferRequest(model_name=request.model_name, id=request.id)
    message.parameters["timeout"].int64_param = request.timeout_us
    for tensor in request.inputs:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.data.shape)
        message.raw_input_contents.append(encode_tensor(tensor))
    return message


def parse_message(message: Any) -> Outputs:
    """Return the outputs of a `ModelInferResponse`.

    Raises:
        ProtocolError: it has other tensors than it says.
    """
    if len(message.outputs) != len(message.raw_output_contents):
        raise ProtocolError(f"{len(message.outputs)} outputs have {len(message.raw_output_contents)} contents")
    pairs = zip(message.outputs, message.raw_output_contents, strict=True)
    return {output.name: decode_tensor(output.name, output.datatype, output.shape, data) for output, data in pairs}
