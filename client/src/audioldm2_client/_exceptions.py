"""Everything that a generation can fail with.

    AudioLDM2Error
      + InvalidRequestError       the request is wrong: change it
      + ServerBusyError           overloaded, starting or restarting: safe to send again
      + RequestCancelledError     the server ended the request, because it was told to
      + DeadlineExceededError     no answer in time, by the server's clock or by the client's
      + ServerUnreachableError    no Triton server answers at the address, or the connection was lost
      + AccessDeniedError         the server, or a proxy before it, wants other credentials
      + ModelNotFoundError        the server has no such model, or it failed to load
      + ServerFaultError          anything else: report it with its request id

Misuse of the API itself raises Python's own exceptions: `TypeError`, `ValueError`, `RuntimeError`, `OSError`.
"""


class AudioLDM2Error(Exception):
    """Base of all errors of a generation.

    Attributes:
        server_message: the server's words exactly as received, None where the server said nothing.
        request_id: the id that the request carried, to look for in the server's log; None where nothing was sent.
        safe_to_retry: whether no server works on the request, because none took it or the one that had it was stopped,
            so that sending it again can't do the work twice at a time. The client itself tries such requests again,
            `max_retries` times. After a gateway's 502 or 504, which leave it open, it tells the server to stop first.
        retry_after_s: how long the server, or a gateway before it, asks to wait before that, seconds; None where it
            doesn't say.
        misconfigured: whether the address, a certificate or a proxy is wrong, so that waiting won't help.
    """

    def __init__(
        self,
        message: str,
        *,
        server_message: str | None = None,
        request_id: str | None = None,
        safe_to_retry: bool = False,
        retry_after_s: float | None = None,
        misconfigured: bool = False,
    ) -> None:
        super().__init__(message)
        self.server_message = server_message
        self.request_id = request_id
        self.safe_to_retry = safe_to_retry
        self.retry_after_s = retry_after_s
        self.misconfigured = misconfigured


class InvalidRequestError(AudioLDM2Error):
    """The request can't be served as it is; the message names the input, its bound and the value received."""


class ServerBusyError(AudioLDM2Error):
    """The server can't do the request now: it is overloaded, starting, stopping, or was stopped. Safe to send again."""


class RequestCancelledError(AudioLDM2Error):
    """The request was cancelled before it was done."""


class DeadlineExceededError(AudioLDM2Error):
    """There was no answer within the time allowed."""


class ServerUnreachableError(AudioLDM2Error):
    """No Triton server answers at the address, or the connection to it was lost; `safe_to_retry` tells which."""


class AccessDeniedError(AudioLDM2Error):
    """The server, or a proxy before it, refuses the credentials: see the client's `headers` and `tls`."""


class ModelNotFoundError(AudioLDM2Error):
    """The server doesn't have the model, or could not load it."""


class ServerFaultError(AudioLDM2Error):
    """The server failed for a reason of its own; its log has more under the request id."""
