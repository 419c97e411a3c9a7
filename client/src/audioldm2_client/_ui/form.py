"""From the widgets' values to the options of a generation. Pure.

Only what can't be sent at all is refused here; ranges are the server's business, and the page shows its words.
"""

from collections.abc import Mapping
from typing import Any

SCHEDULER_ALIASES = (
    "ddim",
    "ddpm",
    "pndm",
    "lms",
    "lms-karras",
    "euler",
    "euler-karras",
    "euler-a",
    "heun",
    "heun-karras",
    "dpm2",
    "dpm2-karras",
    "dpm2-a",
    "dpm2-a-karras",
    "dpm++2m",
    "dpm++2m-karras",
    "dpm++2m-sde",
    "dpm++2m-sde-karras",
    "dpm++2s",
    "dpm++2s-karras",
    "dpm++sde",
    "dpm++sde-karras",
    "deis",
    "deis-karras",
    "unipc",
    "unipc-karras",
    "edm-euler",
)
"""Those of docs/contract.md, in its order."""

_WHOLE = ("num_inference_steps", "num_waveforms_per_prompt", "seed")
_DECIMAL = ("audio_length_in_s", "guidance_scale")


def read_options(values: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the arguments of `AudioLDM2Client.generate`; what was left empty isn't among them.

    Args:
        values: text by the arguments' names; also the numbers, because those of a browser are exact to 2^53 only, and
            an empty one is 0 to Gradio.

    Raises:
        ValueError: what should be a number isn't one.
    """
    options: dict[str, Any] = {name: value for name, value in values.items() if value is not None and value.strip()}
    options["prompt"] = values["prompt"] or ""  # an empty one is the server's to refuse
    for name in _WHOLE:
        if name in options:
            options[name] = _number(name, options[name], int, "a whole number")
    for name in _DECIMAL:
        if name in options:
            options[name] = _number(name, options[name], float, "a number")
    return options


def _number(name: str, text: str, kind: type[int] | type[float], description: str) -> int | float:
    try:
        return kind(text.strip())
    except ValueError as error:
        raise ValueError(f"{name} must be {description}, or empty for the server's choice; got {text!r}") from error
