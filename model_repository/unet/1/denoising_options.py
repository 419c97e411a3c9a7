"""Reads the tensor `denoising_options`, a JSON object, with an error that names the option, its bound and its value."""

import json
import sys
from typing import Any

from denoising_errors import InvalidRequestError

INPUT = "denoising_options"

MAX_SEED = 2**63 - 1

MAX_SCHEDULER_OPTION = 1000
"""Largest number among a scheduler's options: some are the size of what it allocates, as the training timesteps are."""

SchedulerOptions = tuple[tuple[str, bool | int | float | str], ...]
"""Names and values, in the order of the names."""


class DenoisingOptions:
    """The options of one request. Each is read once, and `refuse_others` refuses what wasn't read.

    Args:
        text: UTF-8, a JSON object.

    Raises:
        InvalidRequestError: The text isn't that.
    """

    def __init__(self, text: bytes) -> None:
        try:
            options = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{INPUT} must be JSON in UTF-8: {error}.") from None
        if not isinstance(options, dict):
            raise InvalidRequestError(f"{INPUT} must be a JSON object, got {str(options)[:100]}.")
        self._options: dict[str, Any] = options
        self._known: list[str] = []

    def text(self, name: str) -> str:
        """Return a text."""
        value = self._value(name)
        if not isinstance(value, str):
            raise _wrong(name, "a text", value)
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`."""
        value = self._value(name)
        if not _is_integer(value):
            raise _wrong(name, "a whole number", value)
        if not low <= value <= high:
            raise InvalidRequestError(f"{name} is out of bounds: it must be between {low} and {high}, got {value}.")
        return int(value)

    def sizes(self, name: str, count: int) -> tuple[int, ...]:
        """Return `count` whole numbers."""
        value = self._value(name)
        if not (isinstance(value, list) and len(value) == count and all(map(_is_integer, value))):
            raise _wrong(name, f"a list of {count} whole numbers", value)
        return tuple(value)

    def number(self, name: str) -> float:
        """Return a finite number."""
        value = self._value(name)
        if not _is_finite(value):
            raise _wrong(name, "a finite number", value)
        return float(value)

    def fraction(self, name: str) -> float:
        """Return a number from 0 to 1."""
        value = self.number(name)
        if not 0 <= value <= 1:
            raise InvalidRequestError(f"{name} is out of bounds: it must be between 0 and 1, got {value:g}.")
        return value

    def number_or_none(self, name: str) -> float | None:
        """Return a finite number, or None for JSON's null."""
        if self._options.get(name, 0) is None:
            self._known.append(name)
            return None
        return self.number(name)

    def scheduler_options(self, name: str) -> SchedulerOptions:
        """Return a scheduler's options; numbers are bounded."""
        value = self._value(name)
        if not isinstance(value, dict) or not all(map(_is_plain, value.values())):
            raise InvalidRequestError(
                f"{name} must be a JSON object whose values are true, false, text, or numbers from "
                f"{-MAX_SCHEDULER_OPTION} to {MAX_SCHEDULER_OPTION}."
            )
        return tuple(sorted(value.items()))

    def refuse_others(self) -> None:
        """Refuse options that weren't read.

        Raises:
            InvalidRequestError: There is one.
        """
        if unknown := sorted(self._options.keys() - set(self._known)):
            raise InvalidRequestError(
                f"{INPUT} has the unknown option {unknown[0][:100]!r}; known are {', '.join(self._known)}."
            )

    def _value(self, name: str) -> Any:
        self._known.append(name)
        if name not in self._options:
            raise InvalidRequestError(f"{INPUT} has no {name}.")
        return self._options[name]


def _wrong(name: str, kind: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {kind}, got {json.dumps(value)[:100]}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | str) or (isinstance(value, int | float) and abs(value) <= MAX_SCHEDULER_OPTION)
