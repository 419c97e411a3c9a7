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

_WHOLE = ("num_inference_steps", "num_waveforms_per_prompt")


def read_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `AudioLDM2Client.generate`; what was left empty isn't among them.

    Args:
        values: by the arguments' names. Numbers are floats, as a browser has them; the seed is text, because numbers
            in a browser are exact to 2^53 only.

    Raises:
        ValueError: a part of a step or of a candidate, or a seed that isn't a whole number.
    """
    options = {name: value for name, value in values.items() if value is not None and str(value).strip()}
    options["prompt"] = values["prompt"] or ""  # an empty one is the server's to refuse
    for name in _WHOLE:
        if name in options:
            options[name] = _whole(name, options[name])
    if "seed" in options:
        options["seed"] = _seed(options["seed"])
    return options


def _whole(name: str, value: float) -> int:
    if not float(value).is_integer():
        raise ValueError(f"{name} must be a whole number; got {value:g}")
    return int(value)


def _seed(text: Any) -> int:
    try:
        return int(str(text).strip())
    except ValueError as error:
        raise ValueError(f"seed must be a whole number, or empty for a random one; got {text!r}") from error
