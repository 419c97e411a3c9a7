"""Why a request gets no further, in the words of the contract, for HTTP and for gRPC."""

import json
from dataclasses import dataclass

import grpc


@dataclass(frozen=True)
class Code:
    """What a kind of refusal is called by each protocol.

    Attributes:
        tag: What the sentence starts with, in brackets; empty for nothing.
        http: HTTP's status.
        grpc: gRPC's.
    """

    tag: str
    http: int
    grpc: grpc.StatusCode


INVALID = Code("INVALID_ARG", 400, grpc.StatusCode.INVALID_ARGUMENT)
UNKNOWN_MODEL = Code("", 404, grpc.StatusCode.NOT_FOUND)
NOT_FOUND = Code("NOT_FOUND", 404, grpc.StatusCode.NOT_FOUND)
METHOD = Code("NOT_FOUND", 405, grpc.StatusCode.UNIMPLEMENTED)
UNIMPLEMENTED = Code("NOT_FOUND", 404, grpc.StatusCode.UNIMPLEMENTED)
ENCODING = Code("INVALID_ARG", 415, grpc.StatusCode.UNIMPLEMENTED)
TOO_LARGE = Code("INVALID_ARG", 413, grpc.StatusCode.RESOURCE_EXHAUSTED)
UNAVAILABLE = Code("UNAVAILABLE", 503, grpc.StatusCode.UNAVAILABLE)
INTERNAL = Code("INTERNAL", 500, grpc.StatusCode.INTERNAL)
DEADLINE = Code("DEADLINE", 400, grpc.StatusCode.CANCELLED)

RETRY_AFTER_S = 5
"""What callers are told to wait: about as long as a restart takes."""


class RefusedError(Exception):
    """The request is answered here. The text goes on after the tag."""

    def __init__(self, code: Code, problem: str) -> None:
        super().__init__(problem)
        self.code = code

    @property
    def sentence(self) -> str:
        """What the caller reads."""
        return f"[{self.code.tag}] {self}" if self.code.tag else str(self)

    @property
    def json_body(self) -> str:
        """HTTP's body, in Triton's form."""
        return json.dumps({"error": self.sentence})
