"""Messages of Envoy's external processing, written and read."""

from collections.abc import Mapping
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc

_Mode = processing_mode_pb2.ProcessingMode
HEADERS_ALONE = _Mode(request_header_mode=_Mode.SEND, request_body_mode=_Mode.NONE, response_header_mode=_Mode.SKIP)
READ_ALL = _Mode(request_header_mode=_Mode.SEND, request_body_mode=_Mode.BUFFERED, response_header_mode=_Mode.SEND)
READ_ERROR = _Mode(response_header_mode=_Mode.SEND, response_body_mode=_Mode.BUFFERED)


def headers_of(message: Any) -> dict[str, str]:
    """Return the headers of an `HttpHeaders`, names in lower case."""
    return {header.key: header.raw_value.decode("latin-1") for header in message.headers.headers}


def code_details(message: Any) -> str:
    """Return Envoy's word for where an answer comes from: `via_upstream`, or why it is Envoy's own."""
    for attributes in message.attributes.values():
        if "response.code_details" in attributes.fields:
            return str(attributes.fields["response.code_details"].string_value)
    return ""


def change_request(headers: Mapping[str, str], body: bytes) -> Any:
    """Return what sets headers and the body of a request."""
    return ext_proc.ProcessingResponse(
        request_body=ext_proc.BodyResponse(
            response=ext_proc.CommonResponse(
                header_mutation=ext_proc.HeaderMutation(set_headers=header_options(headers)),
                body_mutation=ext_proc.BodyMutation(body=body),
            )
        )
    )


def change_headers(headers: Mapping[str, str], mode: Any = None) -> Any:
    """Return what sets headers of an answer, and what else of it is wanted (a mode)."""
    mutation = ext_proc.HeaderMutation(set_headers=header_options(headers))
    return ext_proc.ProcessingResponse(
        response_headers=ext_proc.HeadersResponse(response=ext_proc.CommonResponse(header_mutation=mutation)),
        mode_override=mode,
    )


def header_options(headers: Mapping[str, str]) -> list[Any]:
    """Return what sets each header."""
    return [
        base_pb2.HeaderValueOption(
            header=base_pb2.HeaderValue(key=key, raw_value=value.encode()),
            append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
        )
        for key, value in headers.items()
    ]
