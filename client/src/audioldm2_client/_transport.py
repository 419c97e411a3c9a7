"""The only code that does I/O: one inference over gRPC or HTTP, through tritonclient.

tritonclient is imported when a client is made, not when this package is: it takes a tenth of a second per protocol.
"""

from http.client import HTTPException
from types import ModuleType
from typing import Any, Protocol

from audioldm2_client._errors import client_deadline_error, error_from_status, unreachable_error
from audioldm2_client._request import InferenceRequest
from audioldm2_client._result import GetTensor
from audioldm2_client._url import ServerAddress

CONNECT_TIMEOUT_S = 5.0
"""Time allowed for making a connection; part of the time allowed for the whole call."""


class Transport(Protocol):
    """One way to reach a server. Safe to use from several threads."""

    def infer(self, request: InferenceRequest) -> GetTensor:
        """Run one inference and return access to its outputs.

        Raises:
            AudioLDM2Error: the inference failed.
        """

    def close(self) -> None:
        """Free the connections."""


def make_transport(address: ServerAddress) -> Transport:
    """Return the transport for the address' protocol."""
    return HttpTransport(address) if address.scheme == "http" else GrpcTransport(address)


class GrpcTransport:
    """gRPC over one channel, which makes, keeps and remakes its connection by itself."""

    def __init__(self, address: ServerAddress) -> None:
        import tritonclient.grpc as triton

        self._address = address
        self._triton = triton
        self._client = triton.InferenceServerClient(
            address.target,
            channel_args=[
                # Unlimited (-1): 160 s of audio are 10 MB per waveform, gRPC's own limit is 4 MB.
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
                # In spite of its name this is also the time allowed for one connection attempt.
                ("grpc.min_reconnect_backoff_ms", int(CONNECT_TIMEOUT_S * 1000)),
            ],
        )

    def infer(self, request: InferenceRequest) -> GetTensor:
        """See `Transport`."""
        try:
            result = self._client.infer(**_infer_arguments(self._triton, request), client_timeout=request.timeout_s)
        except self._triton.InferenceServerException as error:
            raise error_from_status(error.status(), error.message(), request, self._address) from error
        as_numpy: GetTensor = result.as_numpy
        return as_numpy

    def close(self) -> None:
        """See `Transport`."""
        self._client.close()


class HttpTransport:
    """HTTP with binary tensors, over one connection per inference.

    tritonclient's HTTP client belongs to one thread, and its timeouts to the connection: one per call is simpler than
    a pool of them, and costs under a millisecond.
    """

    def __init__(self, address: ServerAddress) -> None:
        import gevent  # type: ignore[import-untyped]
        import tritonclient.http as triton

        self._address = address
        self._gevent = gevent
        self._triton = triton
        # gevent would print Ctrl-C as well as raise it.
        hub = gevent.get_hub()
        hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)

    def infer(self, request: InferenceRequest) -> GetTensor:
        """See `Transport`."""
        client = self._triton.InferenceServerClient(
            self._address.target, connection_timeout=CONNECT_TIMEOUT_S, network_timeout=None
        )
        # network_timeout would limit each read from the socket; this limits the whole call.
        deadline = self._gevent.Timeout(request.timeout_s)
        try:
            with deadline:
                result = client.infer(**_infer_arguments(self._triton, request))
        except self._gevent.Timeout as error:
            if error is not deadline:
                raise
            raise client_deadline_error(request, self._address) from error
        except self._triton.InferenceServerException as error:
            raise error_from_status(error.status(), error.message(), request, self._address) from error
        except (OSError, HTTPException) as error:
            raise unreachable_error(str(error) or type(error).__name__, request, self._address) from error
        finally:
            client.close()
        as_numpy: GetTensor = result.as_numpy
        return as_numpy

    def close(self) -> None:
        """See `Transport`. No connection outlives its inference."""


def _infer_arguments(triton: ModuleType, request: InferenceRequest) -> dict[str, Any]:
    """Return the arguments of `InferenceServerClient.infer` that gRPC and HTTP have in common."""
    inputs = []
    for tensor in request.inputs:
        triton_input = triton.InferInput(tensor.name, list(tensor.data.shape), tensor.datatype)
        triton_input.set_data_from_numpy(tensor.data)
        inputs.append(triton_input)
    return {
        "model_name": request.model_name,
        "inputs": inputs,
        "request_id": request.id,
        # Tells the server when nobody waits any more; it isn't told when an HTTP connection closes.
        "timeout": request.timeout_us,
    }
