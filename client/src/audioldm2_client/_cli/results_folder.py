"""The folder of a batch: audio files, and `results.jsonl` with a line for each result.

A result is complete when its line is written and its files exist. The line comes after the files: after a failure in
between, the next run makes that result again, in place of the old files.
"""

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from audioldm2_client._audio_file import PART_PATTERN
from audioldm2_client._cli import report
from audioldm2_client._cli.prompts_file import PromptItem
from audioldm2_client._result import GenerationResult

RECORDS = "results.jsonl"


class ResultsFolder:
    """Read and write the folder, in one process at a time.

    Raises:
        OSError: it can't be made, read or written to.
        ValueError: another process is using it.
    """

    def __init__(self, path: Path, audio_format: str) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._format = audio_format
        self._records = (path / RECORDS).open("a+b")
        try:
            _lock(self._records.fileno(), path)
            for leftover in path.glob(PART_PATTERN):
                leftover.unlink(missing_ok=True)
            self._end_torn_line()
            self._done = self._read()
        except BaseException:
            self._records.close()
            raise

    def has(self, item: PromptItem) -> bool:
        """Return whether the result is complete and up to date."""
        record = self._done.get(item.name)
        return (
            record is not None
            and record["key"] == item.key
            and all(
                Path(file).suffix == f".{self._format}" and (self._path / file).is_file() for file in record["files"]
            )
        )

    def add(self, item: PromptItem, result: GenerationResult, elapsed_s: float) -> tuple[list[Path], dict[str, Any]]:
        """Write a result; return its files and its line.

        Raises:
            OSError, RuntimeError, ValueError: it can't be written.
        """
        paths = report.save(result, self._path / f"{item.name}.{self._format}")
        described = report.as_json(result, [Path(path.name) for path in paths], elapsed_s)
        record = {"name": item.name, "line": item.line, "key": item.key, **described, "options": dict(item.options)}
        self._records.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._records.flush()
        os.fsync(self._records.fileno())
        self._done[item.name] = record
        return paths, record

    def close(self) -> None:
        """Release the folder for other processes."""
        self._records.close()

    def _end_torn_line(self) -> None:
        """End the last line, which a power failure may have cut."""
        size = self._records.seek(0, os.SEEK_END)
        if size:
            self._records.seek(size - 1)
            if self._records.read(1) != b"\n":
                self._records.write(b"\n")
                self._records.flush()

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the last record of each name; skip lines that aren't records."""
        self._records.seek(0)
        records = {}
        for line in self._records:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                records[str(record["name"])] = {"key": record["key"], "files": [str(file) for file in record["files"]]}
        return records

    def __enter__(self) -> "ResultsFolder":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no flock: the user must not run two processes in one folder
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(
            f"another process is writing to {str(path)!r}; wait until it ends, or name another folder"
        ) from error
