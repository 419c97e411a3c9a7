"""One request and its answer, as Envoy tells of them: what the door says to each part."""

import re
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote

from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.type.v3 import http_status_pb2

from server.front import grpc_inference, http_inference
from server.front.envoy import MAX_BODY_BYTES
from server.front.envoy_messages import (
    HEADERS_ALONE,
    READ_ALL,
    READ_ERROR,
    change_headers,
    change_request,
    code_details,
    header_options,
    headers_of,
)
from server.front.inference import Inference, new_id
from server.front.refusals import (
    DEADLINE,
    ENCODING,
    INTERNAL,
    INVALID,
    NOT_FOUND,
    RETRY_AFTER_S,
    TOO_LARGE,
    UNAVAILABLE,
    RefusedError,
)
from server.front.targets import Access, Kind, Target

REQUEST_ID = "x-request-id"
MAX_ID_CHARACTERS = 128
"""Of an id in a header."""
JSON_LENGTH = "inference-header-content-length"
UPSTREAM_TIMEOUT = "x-envoy-upstream-rq-timeout-ms"
TIMEOUT_MARGIN_S = 1.0
"""How much later than a stage the front notices that a caller's time is up: a stage says more."""

_LOST_SERVERS = ("upstream_reset", "connection_failure", "no_healthy_upstream", "cluster_not_found")
_TIMEOUT_DETAIL = "response_timeout"
_TOO_LARGE = "request_payload_too_large"
_LONGEST_MESSAGE = 4000
"""Characters of a gRPC error. Triton repeats texts of the request, and clients refuse a header of more than 16 KiB."""
_CALLERS_FAULT = re.compile(
    r'\{"error":"(?:Unable to (?:parse|set) |failed to (?:parse|get) |Converting keyword|Expected JSON )'
)
"""How Triton's words begin for JSON that it can't read as what it should be: the caller's fault (400, not 500)."""
FROM_A_STAGE = "in ensemble '"
"""What Triton puts before an error of a stage: then the first stage has seen the request, and tells of its end."""
_GIVEN_UP = ("1", "4")
"""gRPC's CANCELLED and DEADLINE_EXCEEDED: so Triton answers by itself where a call's own deadline is over."""
_TRITONS_REFUSALS = {
    "400": ("refused", "INVALID_ARG"),
    "404": ("refused", "NOT_FOUND"),
    "503": ("refused", "UNAVAILABLE"),
    "3": ("refused", "INVALID_ARG"),
    "5": ("refused", "NOT_FOUND"),
    "14": ("refused", "UNAVAILABLE"),
    "1": ("left", "CANCELLED"),
    "4": ("left", "CANCELLED"),
}
"""Outcome and reason by the status of HTTP or gRPC."""


class ServerState(Protocol):
    """What the door knows of the server."""

    access: Access
    jobs_models: frozenset[str]

    @property
    def is_broken(self) -> bool:
        """Whether Triton is about to be ended, and what it still answers may be wrong."""

    def check_words(self, message: str) -> None:
        """Refuse an answer that says that a stage is dead."""

    def check_available(self, model: str) -> None:
        """Refuse a request that must wait."""

    def why_lost(self) -> str:
        """Return why a request gets no answer."""

    def record(self, exchange: "Exchange", outcome: str, reason: str, error: str = "") -> None:
        """Tell the operator of a request of which no stage tells."""


@dataclass(eq=False)
class Exchange:
    """What has been seen of one request.

    Attributes:
        state: What the door knows of the server.
        target: What it is for, once its headers have come.
        is_grpc: Whether it is a gRPC call.
        headers: Of the request, names in lower case.
        inference: What was let through to Triton, and isn't answered yet; None before and after.
        is_cut: Whether it was cancelled because the server stops.
        model: The model's name, once it is known.
        request_id: Its id, once it is known.
        status: HTTP's, of Triton's answer.
        was_full: Whether the stages had no room for it.
        was_dropped: Whether Triton has ended it by itself: it tells no stage, and one may have it.
        came_s: When it came, by the monotonic clock.
    """

    state: ServerState
    target: Target | None = None
    is_grpc: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    inference: Inference | None = None
    is_cut: bool = False
    model: str = ""
    request_id: str = ""
    status: str = ""
    was_full: bool = False
    was_dropped: bool = False
    came_s: float = field(default_factory=time.monotonic)

    def respond(self, message: Any) -> Any:
        """Say what Envoy shall do with a part of the request or of its answer.

        Args:
            message: A `ProcessingRequest`.

        Returns:
            A `ProcessingResponse`.
        """
        try:
            match message.WhichOneof("request"):
                case "request_headers":
                    return self._on_request_headers(message.request_headers)
                case "request_body":
                    return self._on_request_body(message.request_body.body)
                case "response_headers":
                    return self._on_response_headers(message)
                case "response_body":
                    return self._on_response_body(message.response_body.body)
                case part:
                    raise RefusedError(INVALID, f"{part} isn't expected.")
        except RefusedError as error:
            if not self.request_id:
                self.request_id = self._choose_id("", "")
            self._record(error, is_answer=message.WhichOneof("request").startswith("response"))
            return self._refusal(error)
        except Exception:  # a fault of this file's: the caller is told that, and not nothing
            traceback.print_exc()
            return self._refusal(RefusedError(INTERNAL, "the front failed on the request."))

    def _record(self, error: RefusedError, *, is_answer: bool) -> None:
        if self.target is not None and self.target.kind is Kind.SERVER_READY:
            return  # a health check, which asks again and again
        tag = error.code.tag or NOT_FOUND.tag
        outcome = {DEADLINE: "deadline", TOO_LARGE: "refused"}.get(error.code, "lost") if is_answer else "refused"
        self.state.record(self, outcome, tag, error.sentence)

    def _on_request_headers(self, request: Any) -> Any:
        self.headers = headers_of(request)
        self.is_grpc = self.headers.get("content-type", "").startswith("application/grpc")
        self.target = self._find_target()
        self.model = self.target.model
        if self.target.kind is Kind.SERVER_READY:
            self.state.check_available("")
        takes_body = self.is_grpc or self.target.kind.has_body
        if takes_body and request.end_of_stream:
            raise RefusedError(INVALID, "the request has no body: over HTTP it is JSON.")
        if not (takes_body or request.end_of_stream or self.target.kind is Kind.INTERNAL):
            raise RefusedError(INVALID, "such a request takes no body.")
        return ext_proc.ProcessingResponse(
            request_headers=ext_proc.HeadersResponse(),
            mode_override=HEADERS_ALONE if request.end_of_stream else READ_ALL,
        )

    def _find_target(self) -> Target:
        if self.is_grpc:
            return self.state.access.grpc_target(self.headers[":path"])
        path = self.headers.get(":path", "")  # CONNECT has none
        target = self.state.access.http_target(self.headers[":method"], path)
        if self.headers.get("content-encoding", "identity") != "identity":
            raise RefusedError(ENCODING, "compressed bodies aren't taken: send it without Content-Encoding.")
        return target

    def _on_request_body(self, body: bytes) -> Any:
        inference = self._read(body)
        if inference is None:
            return ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse())
        self.model = inference.model
        self.state.check_available(inference.model)
        self.inference = inference
        headers = {"content-length": str(len(inference.body))}
        headers |= _id_header(inference)
        if inference.json_length is not None:
            headers[JSON_LENGTH] = str(inference.json_length)
        if inference.timeout_s is not None:
            headers[UPSTREAM_TIMEOUT] = str(int((inference.timeout_s + TIMEOUT_MARGIN_S) * 1000))
        return change_request(headers, inference.body)

    def _read(self, body: bytes) -> Inference | None:
        """Read what goes to Triton; None for what goes as it came."""
        target = self.target
        if target is None:
            raise RefusedError(INVALID, "a body came before its headers.")
        match target.kind:
            case Kind.HTTP_INFER:
                json_length = self.headers.get(JSON_LENGTH)
                return http_inference.read_inference(body, target.model, json_length, self._choose_id)
            case Kind.HTTP_GENERATE:
                return http_inference.read_generate(body, target.model, self._choose_id)
            case Kind.GRPC_INFER:
                inference = grpc_inference.read_inference(body, self._choose_id)
                self.state.access.check_model(inference.model)
                return inference
            case Kind.GRPC_MODEL:
                self.state.access.check_model(grpc_inference.read_model_name(body))
            case Kind.SERVER | Kind.SERVER_READY:
                grpc_inference.check_message(body)
            case Kind.INTERNAL if not self.is_grpc and body:
                http_inference.read_json(body)
        return None

    def _choose_id(self, model: str, in_message: str) -> str:
        """Return the id that the message has, else the header `x-request-id`, else a new one; job boards need none."""
        self.model = model or self.model
        if in_message or model in self.state.jobs_models:
            self.request_id = in_message
            return in_message
        in_header = self.headers.get(REQUEST_ID, "")
        self.request_id = in_header if _fits_a_header(in_header) else new_id()
        return self.request_id

    def _on_response_headers(self, message: Any) -> Any:
        inference = self.inference
        if code_details(message).startswith(_TOO_LARGE):
            raise RefusedError(TOO_LARGE, f"the request is too large: it may have at most {MAX_BODY_BYTES} bytes.")
        headers = headers_of(message.response_headers)
        if inference is None:
            return change_headers(_shorter_message(headers))
        is_error = headers.get(":status") != "200" or headers.get("grpc-status", "0") != "0"
        self._check_server(inference, code_details(message), is_error)
        if is_error and self.is_grpc:
            error = unquote(headers.get("grpc-message", ""))
            self.state.check_words(error)
            self._note_error_of_triton(error, headers.get("grpc-status", ""))
        self.status = headers.get(":status", "")
        reads_body = is_error and not self.is_grpc and not message.response_headers.end_of_stream
        if not reads_body:
            self.inference = None
        return change_headers(_id_header(inference) | _shorter_message(headers), READ_ERROR if reads_body else None)

    def _check_server(self, inference: Inference, detail: str, is_error: bool) -> None:
        """Refuse an answer that isn't Triton's, and one of a server that is about to be ended."""
        self.was_dropped = detail.startswith(_LOST_SERVERS)
        if detail.startswith(_LOST_SERVERS) or (self.is_cut and is_error) or self.state.is_broken:
            self.inference = None
            raise RefusedError(UNAVAILABLE, self.state.why_lost())
        if detail.startswith(_TIMEOUT_DETAIL):
            raise RefusedError(DEADLINE, f"the request's timeout of {inference.timeout_s:g} s is over.")

    def _on_response_body(self, body: bytes) -> Any:
        self.inference = None
        error = body.decode(errors="replace")
        self.state.check_words(error)
        if _CALLERS_FAULT.match(error):
            self.status = str(INVALID.http)
        self._note_error_of_triton(error, self.status)
        mutation = ext_proc.HeaderMutation(set_headers=header_options({":status": self.status}))
        return ext_proc.ProcessingResponse(
            response_body=ext_proc.BodyResponse(response=ext_proc.CommonResponse(header_mutation=mutation))
        )

    def _note_error_of_triton(self, error: str, status: str) -> None:
        """Record what Triton itself has refused. Its words aren't: they may have some of the request in them."""
        self.was_full = f"[{UNAVAILABLE.tag}]" in error
        self.was_dropped |= FROM_A_STAGE not in error and self.is_grpc and status in _GIVEN_UP
        if FROM_A_STAGE not in error and self.model in self.state.access.models:
            outcome, reason = _TRITONS_REFUSALS.get(status, ("failed", "INTERNAL"))
            self.state.record(self, outcome, reason)

    def _refusal(self, error: RefusedError) -> Any:
        headers = {REQUEST_ID: self.request_id} if _fits_a_header(self.request_id) else {}
        if error.code is UNAVAILABLE:
            headers["retry-after"] = str(RETRY_AFTER_S)
        return ext_proc.ProcessingResponse(
            immediate_response=ext_proc.ImmediateResponse(
                status=http_status_pb2.HttpStatus(code=error.code.http),
                headers=ext_proc.HeaderMutation(set_headers=header_options(headers)),
                body=error.sentence.encode(),
                grpc_status=ext_proc.GrpcStatus(status=error.code.grpc.value[0]) if self.is_grpc else None,
            )
        )


def _id_header(inference: Inference) -> dict[str, str]:
    """Return the header with the request's id; none for an id that no header can carry."""
    return {REQUEST_ID: inference.request_id} if _fits_a_header(inference.request_id) else {}


def _fits_a_header(request_id: str) -> bool:
    return 0 < len(request_id) <= MAX_ID_CHARACTERS and request_id.isascii() and request_id.isprintable()


def _shorter_message(headers: dict[str, str]) -> dict[str, str]:
    """Return the header with the beginning of a gRPC error that is too long; none where it isn't."""
    message = headers.get("grpc-message", "")
    if len(message) <= _LONGEST_MESSAGE:
        return {}
    return {"grpc-message": re.sub("%.?$", "", message[:_LONGEST_MESSAGE]) + "..."}
