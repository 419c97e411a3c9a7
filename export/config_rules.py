"""Rules for what the keys of a configuration may be, and the one sentence for a value that breaks its rule.

Plain data: a `Schema` lists the keys of one kind of file, a `Rule` is a description and a predicate. The tables are in
`checkpoint_schemas`.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.errors import CheckpointError

MAX_VALUE_CHARACTERS = 80
"""Of a value in a sentence: a list of a thousand numbers explains nothing."""


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        description: Completes the sentence "it must be".
        accepts: Whether a value, as JSON gives it, is right. It is never asked about NaN or infinity.
    """

    description: str
    accepts: Callable[[Any], bool]


REQUIRED = object()
"""The default of a key that a file must have."""


OWN_DEFAULT = object()
"""The default of a key that differs from class to class, and that nothing here reads."""


@dataclass(frozen=True)
class Key:
    """One key of a configuration.

    Attributes:
        rule: What its value must be.
        default: What the library's class takes where the file lacks the key, as JSON would give it; or REQUIRED, or
            OWN_DEFAULT.
    """

    rule: Rule
    default: Any = REQUIRED


@dataclass(frozen=True)
class Schema:
    """All keys of one kind of configuration that its library's class knows.

    A key that the class doesn't know changes nothing there, and therefore nothing here: it is ignored.

    Attributes:
        keys: Those that reach the computation.
        harmless: Those that the class reads, but that change nothing about inference: training, heads that aren't run,
            what the library overwrites. They are never checked.
        aliases: Other names under which the class takes a key.
        sections: Configurations within this one, by their key.
    """

    keys: Mapping[str, Key]
    harmless: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, "Schema"] = field(default_factory=dict)

    def read(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> dict[str, Any]:
        """Check `values` and return the keys that reach the computation, defaults filled in.

        Args:
            values: The JSON object.
            path: The file that it is from.
            prefix: Where in the file the object is, such as `text_config.`.

        Raises:
            CheckpointError: A value breaks its rule, or a required key is missing.
        """
        named = self._without_aliases(values, path, prefix)
        known = {name: _value(key, named, name, path, prefix) for name, key in self.keys.items()}
        for name, section in self.sections.items():
            inner = {} if named.get(name) is None else named[name]
            check(prefix + name, inner, OBJECT, path)
            known[name] = section.read(inner, path, f"{prefix}{name}.")
        return known

    def _without_aliases(self, values: Mapping[str, Any], path: Path, prefix: str) -> dict[str, Any]:
        named = {name: value for name, value in values.items() if name not in self.aliases}
        for alias, name in self.aliases.items():
            if alias in values:
                same = named.setdefault(name, values[alias])
                check(prefix + alias, values[alias], only(same, f", as {name}, which is the same setting"), path)
        return named


def check(name: str, value: Any, rule: Rule, path: Path) -> None:
    """Raise CheckpointError unless `value`, of the key `name` in the file `path`, is as `rule` says."""
    _check(f"{name} in {path} is", value, rule)


def _check(beginning: str, value: Any, rule: Rule) -> None:
    if not _is_finite(value) or not rule.accepts(value):
        raise CheckpointError(f"{beginning} {_shown(value)}: it must be {rule.description}.")


def integer(low: int, high: int | None = None, why: str = "") -> Rule:
    """Return the rule for whole numbers from `low` to `high`; true, false and 8.0 are none."""
    bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
    return Rule(
        f"a whole number {bounds}{why}", lambda value: _is_integer(value) and low <= value <= (high or math.inf)
    )


def one_of(*names: str) -> Rule:
    """Return the rule for one of several words."""
    return Rule(", ".join(names[:-1]) + f" or {names[-1]}", lambda value: isinstance(value, str) and value in names)


def only(value: Any, why: str = "") -> Rule:
    """Return the rule for one value alone."""
    return Rule(
        f"{_shown(value)}{why}",
        lambda other: type(other) is type(value) and other == value,
    )


def nullable(rule: Rule) -> Rule:
    """Return the rule for null or what `rule` says."""
    return Rule(f"null, or {rule.description}", lambda value: value is None or rule.accepts(value))


def list_of(rule: Rule, length: int | None = None) -> Rule:
    """Return the rule for a list, not empty, each of whose items is as `rule` says."""
    size = "a list, each of it" if length is None else f"a list of {length}, each of it"
    return Rule(
        f"{size} {rule.description}",
        lambda value: (
            isinstance(value, list)
            and len(value) > 0
            and length in (None, len(value))
            and all(rule.accepts(item) for item in value)
        ),
    )


def single_or_list(rule: Rule) -> Rule:
    """Return the rule for one value, or a list with one for each level."""
    many = list_of(rule)
    return Rule(
        f"{rule.description}, or a list of such, one for each level",
        lambda value: rule.accepts(value) or many.accepts(value),
    )


POSITIVE = integer(1)
BOOLEAN = Rule("true or false", lambda value: isinstance(value, bool))
NUMBER = Rule("a finite number", lambda value: _is_number(value))
POSITIVE_NUMBER = Rule("a finite number above 0", lambda value: _is_number(value) and value > 0)
ODD = Rule("an odd whole number", lambda value: _is_integer(value) and value > 0 and value % 2 == 1)
OBJECT = Rule("a JSON object", lambda value: isinstance(value, Mapping))


def _value(key: Key, values: Mapping[str, Any], name: str, path: Path, prefix: str) -> Any:
    if name in values:
        check(prefix + name, values[name], key.rule, path)
        return values[name]
    if key.default is REQUIRED:
        raise CheckpointError(f"{path} lacks {prefix}{name}: it must be {key.rule.description}.")
    if key.default is OWN_DEFAULT:
        return None
    # The defaults of some classes aren't for this pipeline.
    _check(f"{path} lacks {prefix}{name}, whose default is", key.default, key.rule)
    return key.default


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return True


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[:MAX_VALUE_CHARACTERS] + "..."
