"""The file of prompts: the prompt, the options and the result's name on each line."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from audioldm2_client._cli.report import waveform_paths
from audioldm2_client._exceptions import InvalidRequestError
from audioldm2_client._options import OPTIONS, GenerationOptions
from audioldm2_client._request import build_request, check_request_id

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_SLUG_LENGTH = 40
_KEYS = ("prompt", "name", *OPTIONS, "request_id")


@dataclass(frozen=True)
class PromptItem:
    """One line of the file.

    Attributes:
        line: its number, from 1.
        prompt: what to hear.
        options: arguments of `generate`: those of the line, and the command's where the line has none.
        name: of the result's files, without the ending.
        key: hash of what is asked for; an existing result with the same key is up to date.
        request_id: the line's own; None means a random one. Another id is no other result.
    """

    line: int
    prompt: str
    options: GenerationOptions
    name: str
    key: str
    request_id: str | None = None


def read_prompts(path: Path, defaults: GenerationOptions, model_name: str) -> list[PromptItem]:
    """Read a prompt on each line, or a JSON object where a line begins with a brace; blank lines are skipped.

    Raises:
        ValueError: not UTF-8, no prompt at all, or a bad line, whose number is named.
        OSError: the file can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} must be UTF-8 text: {error}") from error
    items = list(_parse(text, defaults, model_name, str(path)))
    if not items:
        raise ValueError(f"{str(path)!r} holds no prompts")
    _check_names(items, str(path))
    _check_request_ids(items, str(path))
    return items


def _parse(text: str, defaults: GenerationOptions, model_name: str, source: str) -> Iterator[PromptItem]:
    seen: Counter[str] = Counter()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompt, name, request_id, own = _parse_line(line.strip())
            options = cast(GenerationOptions, {**defaults, **own})
            # Checked now, so that a mistake on the last line is found before anything is generated.
            build_request(prompt, options, model_name=model_name, request_id=request_id or "-", timeout_s=1)
        except (ValueError, TypeError, InvalidRequestError) as error:
            raise ValueError(f"{source}, line {number}: {error}") from error
        wanted = json.dumps([model_name, prompt, options], sort_keys=True)
        seen[wanted] += 1
        key = hashlib.sha256(f"{wanted}{seen[wanted]}".encode()).hexdigest()[:16]
        yield PromptItem(number, prompt, options, name or _make_name(prompt, key), key, request_id)


def _parse_line(line: str) -> tuple[str, str | None, str | None, dict[str, Any]]:
    """Return the prompt, the name and the request's id if there are any, and the options."""
    if not line.startswith("{"):
        return line, None, None, {}
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it begins with a brace and isn't JSON: {error}") from error
    for key in values:
        if key not in _KEYS:
            raise ValueError(f"{key!r} must be one of {', '.join(_KEYS)}")
    prompt, name, request_id = (values.pop(key, None) for key in ("prompt", "name", "request_id"))
    if not isinstance(prompt, str):
        raise ValueError("prompt must be a text")
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(
            f"name must have 1 to 100 of the characters A-Z a-z 0-9 . _ - and begin with none of . and -; got {name!r}"
        )
    if request_id is not None:
        check_request_id(request_id)
    return prompt, name, request_id, {key: value for key, value in values.items() if value is not None}


def _make_name(prompt: str, key: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:_SLUG_LENGTH].strip("-")
    return f"{slug or 'prompt'}-{key[:8]}"


def _check_names(items: list[PromptItem], source: str) -> None:
    lines: dict[str, int] = {}
    for item in items:
        count = item.options.get("num_waveforms_per_prompt") or 1
        for path in waveform_paths(Path(item.name), max(1, min(count, 100))):
            other = lines.setdefault(path.name.lower(), item.line)
            if other != item.line:
                raise ValueError(f"{source}, line {item.line}: the name {path.name!r} is also that of line {other}")


def _check_request_ids(items: list[PromptItem], source: str) -> None:
    """Refuse an id that stands on two lines: of two live requests, the server knows only the later one by it."""
    lines: dict[str, int] = {}
    for item in items:
        if item.request_id is not None and lines.setdefault(item.request_id, item.line) != item.line:
            raise ValueError(
                f"{source}, line {item.line}: the request_id {item.request_id!r} is also that of line "
                f"{lines[item.request_id]}"
            )
