"""Reads the `parameters` of a `config.pbtxt`, with an error that names the parameter, its bound and its value."""

import json
import math
from collections.abc import Mapping


class ConfigParameters:
    """The parameters of one model. Each is read by its name, and `refuse_others` refuses what wasn't read.

    Args:
        parameters: Texts by name.
    """

    def __init__(self, parameters: Mapping[str, str]) -> None:
        self._parameters = dict(parameters)
        self._known: list[str] = []

    @classmethod
    def from_model_config(cls, model_config: str) -> "ConfigParameters":
        """Read them from a model's configuration, as Triton hands it over in JSON."""
        parameters = json.loads(model_config)["parameters"]
        return cls({name: value["string_value"] for name, value in parameters.items()})

    def text(self, name: str) -> str:
        """Return a parameter as it is.

        Raises:
            ValueError: It is missing.
        """
        self._known.append(name)
        if name not in self._parameters:
            raise ValueError(f"config.pbtxt: parameter {name} is missing.")
        return self._parameters[name].strip()

    def count(self, name: str) -> int:
        """Return a positive whole number.

        Raises:
            ValueError: It is missing, or something else.
        """
        return self.parse_count(name, self.text(name))

    def number(self, name: str) -> float:
        """Return a positive, finite number.

        Raises:
            ValueError: It is missing, or something else.
        """
        text = self.text(name)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"config.pbtxt: parameter {name} must be a positive, finite number, got {text!r}.")
        return number

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Return one of `choices`.

        Raises:
            ValueError: It is missing, or something else.
        """
        text = self.text(name)
        if text not in choices:
            raise ValueError(f"config.pbtxt: parameter {name} must be one of {', '.join(choices)}, got {text!r}.")
        return text

    def parse_count(self, name: str, text: str) -> int:
        """Return the positive whole number in `text`, a part of the parameter `name`.

        Raises:
            ValueError: It is something else.
        """
        if not (text.strip().isascii() and text.strip().isdigit() and int(text) > 0):
            raise ValueError(f"config.pbtxt: parameter {name} must be a positive whole number, got {text!r}.")
        return int(text)

    def refuse_others(self) -> None:
        """Refuse parameters that weren't read.

        Raises:
            ValueError: There is one.
        """
        if unknown := sorted(self._parameters.keys() - set(self._known)):
            raise ValueError(f"config.pbtxt: unknown parameter {unknown[0]}; known are {', '.join(self._known)}.")
