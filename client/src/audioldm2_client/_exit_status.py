"""The exit statuses of the command line."""

import contextlib
import sys

from audioldm2_client._exceptions import (
    AccessDeniedError,
    AudioLDM2Error,
    DeadlineExceededError,
    InvalidRequestError,
    ServerBusyError,
    ServerUnreachableError,
)

FAULT = 1
USAGE = 2
UNAVAILABLE = 3
DEADLINE = 4
DENIED = 5

EXPLANATION = """\
exit status: 0 done; 1 the server failed or a file could not be written; 2 bad usage, or the server refuses a value;
3 server busy or unreachable, try again later; 4 not done within --timeout; 5 the server wants another API key or
certificate; 129 hung up, 130 interrupted, 143 terminated (SIGHUP, Ctrl-C, SIGTERM).
With --prompts, that of the first line which failed."""

_STATUS_OF: tuple[tuple[type[AudioLDM2Error], int], ...] = (
    (InvalidRequestError, USAGE),
    (ServerBusyError, UNAVAILABLE),
    (ServerUnreachableError, UNAVAILABLE),
    (DeadlineExceededError, DEADLINE),
    (AccessDeniedError, DENIED),
)


def status_of(error: AudioLDM2Error) -> int:
    """Return the exit status that an error leads to."""
    return next((status for kind, status in _STATUS_OF if isinstance(error, kind)), FAULT)


def first_line(reason: object) -> str:
    """Return the first line of the reason; more, such as a traceback, is in the server's log."""
    return str(reason).strip().splitlines()[0]


def fail(reason: object, status: int) -> int:
    """Print the reason, and return the status."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        if sys.stderr is not None:  # closed from the start; `print` would take stdout
            print(f"audioldm2: {first_line(reason)}", file=sys.stderr)
    return status
