"""What both clients share: settings and requests, without I/O."""

from collections.abc import Mapping, Sequence

from audioldm2_client._abandoned import abandoned
from audioldm2_client._call import tell_to_stop
from audioldm2_client._connection import ConnectionOptions, TlsOptions, check_headers
from audioldm2_client._flow import Route
from audioldm2_client._network import with_proxy
from audioldm2_client._options import GenerationOptions
from audioldm2_client._request import InferenceRequest, build_request, check_timeout, new_request_id
from audioldm2_client._url import ServerAddress, parse_urls

DEFAULT_URL = "localhost:8001"
DEFAULT_TIMEOUT_S = 600.0
DEFAULT_MAX_RETRIES = 2
DEFAULT_READY_TIMEOUT_S = 60.0


class ClientCore:
    """Check the settings of a client, and build its requests."""

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        model_name: str,
        timeout_s: float,
        max_retries: int,
        tls: TlsOptions | None,
        headers: Mapping[str, str] | None,
    ) -> None:
        if tls is not None:
            tls.check()
        if not isinstance(max_retries, int) or isinstance(max_retries, bool):
            raise TypeError(f"max_retries must be an int; got {type(max_retries).__name__}")
        if max_retries < 0:
            raise ValueError(f"max_retries must be at least 0; got {max_retries}")
        self.model_name = model_name
        self.timeout_s = check_timeout(timeout_s)
        self.max_retries = max_retries
        self._connection = ConnectionOptions(tls, check_headers(headers))
        self._route = Route(tuple(map(with_proxy, parse_urls(url, with_tls_options=tls is not None))))
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._route)!r}, model_name={self.model_name!r})"

    def _prepare(
        self, prompt: str | Sequence[str], timeout_s: float | None, request_id: str | None, options: GenerationOptions
    ) -> InferenceRequest:
        self._check_open()
        return build_request(
            prompt,
            options,
            model_name=self.model_name,
            request_id=new_request_id() if request_id is None else request_id,
            timeout_s=self.timeout_s if timeout_s is None else timeout_s,
        )

    def _tell_to_stop(self, request: InferenceRequest, address: ServerAddress) -> None:
        """Have a server told that nobody waits for a request any more; waits for nothing, and takes no lock."""
        abandoned.put(lambda: tell_to_stop(request, address, self._connection))

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the client is closed; make a new one")
