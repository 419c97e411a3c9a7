"""What a request is for, by its method and path, and whether that can be reached from outside."""

import re
from dataclasses import dataclass
from enum import Enum, auto

from server.front.refusals import METHOD, NOT_FOUND, UNIMPLEMENTED, UNKNOWN_MODEL, RefusedError

SHOWN_CHARACTERS = 60

_SERVER_PATH = re.compile(r"/v2(?:/health/(?:live|(?P<ready>ready)))?/?")
_MODEL_PATH = re.compile(
    r"/v2/models/(?P<model>[\w.-]{1,256})(?:/versions/[1-9]\d{0,8})?(?:/(?P<action>ready|infer|generate|generate_stream))?",
    re.ASCII,
)
_SERVICE = "/inference.GRPCInferenceService/"
_SERVER_METHODS = {f"{_SERVICE}{name}" for name in ("ServerLive", "ServerMetadata")}
_READY_METHODS = {f"{_SERVICE}ServerReady", "/grpc.health.v1.Health/Check"}
_MODEL_METHODS = {f"{_SERVICE}{name}" for name in ("ModelReady", "ModelMetadata")}
_INFER_METHOD = f"{_SERVICE}ModelInfer"
_STREAMS = {f"{_SERVICE}ModelStreamInfer", "/grpc.health.v1.Health/Watch"}


class Kind(Enum):
    """What is done with a request."""

    SERVER = auto()  # let through: it names no model
    SERVER_READY = auto()  # let through, unless the server stops
    HTTP_MODEL = auto()  # let through: the path has told the model
    GRPC_MODEL = auto()  # the message tells the model
    HTTP_INFER = auto()
    HTTP_GENERATE = auto()
    GRPC_INFER = auto()
    INTERNAL = auto()  # let through where internals are exposed: its body is only looked at for its form

    @property
    def has_body(self) -> bool:
        """Whether such a request has a body that is read here."""
        return self in (Kind.GRPC_MODEL, Kind.HTTP_INFER, Kind.HTTP_GENERATE, Kind.GRPC_INFER)


@dataclass(frozen=True)
class Target:
    """What a request is for.

    Attributes:
        kind: What is done with it.
        model: The model that the path names; empty where the message names it.
    """

    kind: Kind
    model: str = ""


@dataclass(frozen=True)
class Access:
    """What can be reached.

    Attributes:
        models: The models that are public.
        exposes_internals: Whether everything else can be reached, too.
    """

    models: frozenset[str]
    exposes_internals: bool = False

    def check_model(self, model: str) -> None:
        """Refuse a model that isn't public; whether it exists isn't told.

        Raises:
            RefusedError: It isn't.
        """
        if model not in self.models and not self.exposes_internals:
            public = ", ".join(sorted(self.models))
            # Triton's own words, which clients know.
            raise RefusedError(
                UNKNOWN_MODEL, f"Request for unknown model: {_shown(model)} is not found; there are {public}."
            )

    def http_target(self, method: str, path: str) -> Target:
        """Find out what an HTTP request is for.

        Raises:
            RefusedError: It can't be reached.
        """
        path = path.partition("?")[0]
        target = self._http_target(path)
        wanted = "POST" if target.kind in (Kind.HTTP_INFER, Kind.HTTP_GENERATE) else "GET"
        if method != wanted and target.kind is not Kind.INTERNAL:
            raise RefusedError(METHOD, f"{_shown(path)} takes {wanted}, got {_shown(method)}.")
        return target

    def grpc_target(self, path: str) -> Target:
        """Find out what a gRPC call is for.

        Raises:
            RefusedError: It can't be reached.
        """
        if path in _STREAMS:
            raise RefusedError(UNIMPLEMENTED, f"{_shown(path)} isn't offered: streams aren't; use ModelInfer.")
        if path == _INFER_METHOD:
            return Target(Kind.GRPC_INFER)
        if path in _READY_METHODS:
            return Target(Kind.SERVER_READY)
        if path in _SERVER_METHODS:
            return Target(Kind.SERVER)
        if path in _MODEL_METHODS:
            return Target(Kind.GRPC_MODEL)
        if self.exposes_internals and path.startswith(_SERVICE):  # any other path is HTTP's, whatever its content type
            return Target(Kind.INTERNAL)
        raise RefusedError(UNIMPLEMENTED, f"{_shown(path)} can't be reached here; ModelInfer and health can.")

    def _http_target(self, path: str) -> Target:
        if match := _SERVER_PATH.fullmatch(path):
            return Target(Kind.SERVER_READY if match["ready"] else Kind.SERVER)
        if match := _MODEL_PATH.fullmatch(path):
            self.check_model(match["model"])
            kinds = {"infer": Kind.HTTP_INFER, "generate": Kind.HTTP_GENERATE, "generate_stream": Kind.HTTP_GENERATE}
            return Target(kinds.get(match["action"], Kind.HTTP_MODEL), match["model"])
        if self.exposes_internals:
            return Target(Kind.INTERNAL)
        raise RefusedError(
            NOT_FOUND, f"{_shown(path)} can't be reached here; /v2/models/MODEL/generate and /v2/health/ready can."
        )


def _shown(text: str) -> str:
    return ascii(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")
