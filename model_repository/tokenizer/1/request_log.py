"""One line for each request that is over: who, how it ended, where the time went, what was asked for. No text of it.

The line is `request key=value ...` (logfmt), or a JSON object where AUDIOLDM2_LOG_FORMAT is `json`.
"""

import json
import re

from live_requests import EndedRequest

FORMAT_VARIABLE = "AUDIOLDM2_LOG_FORMAT"
FORMATS = ("text", "json")

OUTCOMES = {
    "ok": "finished",
    "INVALID_ARG": "refused",
    "UNAVAILABLE": "refused",
    "DEADLINE": "deadline",
    "CANCELLED": "cancelled",
    "INTERNAL": "failed",
}
"""What becomes of a request, by the reason."""

SHOWN_ID_CHARACTERS = 128
_PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)

Fields = dict[str, str | int | float]


def read_format(value: str) -> str:
    """Return the format that FORMAT_VARIABLE asks for; an empty value is `text`.

    Raises:
        ValueError: It is none of FORMATS.
    """
    if (value or FORMATS[0]) not in FORMATS:
        raise ValueError(f"{FORMAT_VARIABLE} must be one of {', '.join(FORMATS)}, got {value!r}.")
    return value or FORMATS[0]


def line_of(ended: EndedRequest, model: str, log_format: str) -> str:
    """Return the line, without its end.

    Args:
        ended: The request.
        model: The ensemble's name.
        log_format: One of FORMATS.
    """
    fields = fields_of(ended, model)
    if log_format == "json":
        return json.dumps({"event": "request", **fields})
    return " ".join(["request", *(f"{name}={_logfmt(value)}" for name, value in fields.items())])


def fields_of(ended: EndedRequest, model: str) -> Fields:
    """Return what the line has, by name and in its order."""
    who: Fields = {"id": ended.request_id[:SHOWN_ID_CHARACTERS]} if ended.request_id else {}
    who["ticket"] = f"{ended.ticket:016x}"
    how: Fields = {"model": model, "outcome": OUTCOMES[ended.reason], "reason": ended.reason}
    times: Fields = {f"{stage}_s": round(seconds, 3) for stage, seconds in ended.seconds.items()}
    what: Fields = {}
    if request := ended.request:
        what = {
            "steps": request.num_inference_steps,
            "length_s": request.audio_length_in_s,
            "prompts": len(request.prompts),
            "candidates": request.num_waveforms_per_prompt,
        }
    return {**who, **how, **times, **what, "ahead": ended.requests_ahead}


def _logfmt(value: str | float) -> str:
    """Return a value as it is where it is plain, and otherwise in JSON's quotes, which end no line and no value."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
