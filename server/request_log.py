"""The log of requests, as the front writes its part of it and as the operator sees all of it: a line for each request.

The stages' part comes out of Triton's log, where the model `tokenizer` writes it in the same form. That has code of its
own (`model_repository/tokenizer/1/request_log.py`), for it also runs where this package isn't; a test compares both.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from server.errors import ServerError

FORMAT_VARIABLE = "AUDIOLDM2_LOG_FORMAT"
FORMATS = ("text", "json")
LEFT_OUT = "left_out"
"""The event of a line that says how many lines aren't there."""

REFUSALS_PER_S = 10.0
REFUSALS_AT_ONCE = 50
"""So many lines of refusals may follow one another; then REFUSALS_PER_S. A refusal costs its caller nothing."""

_PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)
# I1126 01:38:04.123456 4711 model.py:101] "request id=\"a b\" ..."
_TRITON_LINE = re.compile(r'^I\d{4} \S+ \d+ model\.py:\d+\] "(request (?:id|ticket)=.*)"$')
_JSON_LINE = '{"event": "request", '
_REFUSED_TEXT = re.compile(r'request (?:\w+=(?:"(?:\\.|[^"\\])*"|[^\s"]\S*) )*outcome=refused ')
_REFUSED_JSON = '"outcome": "refused", '


def read_format(environment: Mapping[str, str] = os.environ) -> str:
    """Return the format that FORMAT_VARIABLE asks for; without it, `text`.

    Raises:
        ServerError: It is none of FORMATS.
    """
    if (value := environment.get(FORMAT_VARIABLE, "") or FORMATS[0]) not in FORMATS:
        raise ServerError(f"{FORMAT_VARIABLE} must be one of {', '.join(FORMATS)}, got {value!r}.")
    return value


def format_line(event: str, fields: Mapping[str, str | int | float], log_format: str) -> str:
    """Return a line of the log, without its end.

    Args:
        event: What it tells of; `request` for a request.
        fields: What it has, in this order.
        log_format: One of FORMATS.
    """
    if log_format == "json":
        return json.dumps({"event": event, **fields})
    return " ".join([event, *(f"{name}={_logfmt(value)}" for name, value in fields.items())])


def request_line(line: str) -> str:
    """Return the request's line that a line of Triton's log has in its quotes; an empty text where it has none."""
    if line.startswith(_JSON_LINE):
        return line
    return _unquoted(match[1]) if (match := _TRITON_LINE.match(line)) else ""


def without_request_lines(log: str) -> str:
    """Drop the lines of requests from a part of Triton's log."""
    return "".join(line for line in log.splitlines(keepends=True) if not request_line(line.rstrip("\n")))


def with_time(line: str, unix_s: float) -> str:
    """Put the time before a line of either format."""
    text = datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return f'{{"time": "{text}", {line[1:]}' if line.startswith("{") else f"time={text} {line}"


def is_refusal(line: str) -> bool:
    """Say whether a request's line tells of a refusal."""
    return _REFUSED_JSON in line if line.startswith("{") else bool(_REFUSED_TEXT.match(line))


class RequestLog:
    """Hands lines of requests on; of a flood of refusals as many as are of use, and how many there were.

    Args:
        write: Takes a line, without its end.
        log_format: One of FORMATS.
        clock: Seconds.
    """

    def __init__(
        self, write: Callable[[str], object], log_format: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._format, self._clock = write, log_format, clock
        self._allowed, self._looked_s = float(REFUSALS_AT_ONCE), clock()
        self._left_out = 0
        self._lock = threading.Lock()

    def add(self, line: str, *, is_refusal: bool) -> None:
        """Hand a line on, or, where it is one of too many refusals, count it."""
        with self._lock:
            self._refill()
            if is_refusal and self._allowed < 1.0:
                self._left_out += 1
                return
            if is_refusal:
                self._allowed -= 1.0
            self._write(line)

    def add_request(self, **fields: str | float) -> None:
        """Write a request's line from its fields, and hand it on."""
        self.add(format_line("request", fields, self._format), is_refusal=fields.get("outcome") == "refused")

    def flush(self, *, at_end: bool = False) -> None:
        """Say how many were left out, once there is room for it again; call it from time to time, and at the end."""
        with self._lock:
            self._refill()
            if self._left_out and (at_end or self._allowed >= 1.0):
                self._allowed -= 1.0
                self._write(format_line(LEFT_OUT, {"refusals": self._left_out}, self._format))
                self._left_out = 0

    def _refill(self) -> None:
        now = self._clock()
        self._allowed = min(self._allowed + (now - self._looked_s) * REFUSALS_PER_S, float(REFUSALS_AT_ONCE))
        self._looked_s = now


def _logfmt(value: str | float) -> str:
    """Return a value as it is where it is plain, and otherwise in JSON's quotes, which end no line and no value."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _unquoted(escaped: str) -> str:
    """Undo the quoting of Triton's log."""
    try:
        return str(json.loads(f'"{escaped}"'))
    except ValueError:
        return escaped
