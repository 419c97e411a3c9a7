"""From the form's values to the options of a generation. Pure.

Only what can't be sent at all is refused here; the server checks the ranges, and the page shows its words.
"""

from collections.abc import Mapping
from typing import Any

from audioldm2_client._options import OPTIONS, Option

FIELDS: Mapping[str, Option] = {name: option for name, option in OPTIONS.items() if option.label}
"""The options that have a field, in its order."""


def read_options(values: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the arguments of `AudioLDM2Client.generate`, without the options whose fields are empty.

    Args:
        values: text by the arguments' names. Numbers come as text too: a browser's are exact to 2^53 only, and to
            Gradio an empty one is 0.

    Raises:
        ValueError: what should be a number isn't one.
    """
    options: dict[str, Any] = {"prompt": values["prompt"] or ""}  # the server refuses an empty one
    for name, option in FIELDS.items():
        if text := (values.get(name) or "").strip():
            options[name] = _number(name, text, option) if option.python_type is not str else values[name]
    return options


def _number(name: str, text: str, option: Option) -> Any:
    try:
        return option.python_type(text)
    except ValueError as error:
        description = "a whole number" if option.python_type is int else "a number"
        raise ValueError(f"{name} must be {description}, or empty for the server's choice; got {text!r}") from error
