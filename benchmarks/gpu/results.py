"""The figures so far, in a JSON file and a Markdown file that are whole at every moment.

Each section of the benchmark runs in a process of its own, one after the other, and adds its figures there.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.tables import make_tables
from benchmarks.report import Report, Samples, Table, describe_machine, measure

NAME = "gpu"
COMMAND = "python -m benchmarks.gpu"


class OutOfTimeError(Exception):
    """The budget is used up."""


class NotPossibleError(Exception):
    """What is to be measured isn't on this machine; the message says what."""


class Results:
    """Figures by name.

    Args:
        folder: Where the files are; what is there already is kept.
        deadline: When the budget ends, on `time.time`.

    Attributes:
        samples: Measured values, `{"values": [...], "unit": ...}`.
        errors: `{"error": ..., "bound": ...}`, relative RMS against float32.
        facts: Whatever else there is to say.
        notes: Sentences, by section: why something wasn't measured, what was chosen.
    """

    def __init__(self, folder: Path, deadline: float) -> None:
        self._folder, self._deadline, self._started = folder, deadline, time.time()
        self._report = self._read()
        measurements = self._report.measurements
        self.samples: dict[str, dict[str, Any]] = measurements.setdefault("samples", {})
        self.errors: dict[str, dict[str, float]] = measurements.setdefault("errors", {})
        self.facts: dict[str, Any] = measurements.setdefault("facts", {})
        self.notes: dict[str, list[str]] = measurements.setdefault("notes", {})

    @property
    def json_file(self) -> Path:
        """All of it."""
        return self._folder / f"{NAME}.json"

    @property
    def markdown_file(self) -> Path:
        """The tables."""
        return self._folder / f"{NAME}.md"

    @classmethod
    def begin(cls, folder: Path, deadline: float, commit: str = "") -> "Results":
        """Forget what is there, and begin anew; `commit` is for files that came without git."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{NAME}.json").unlink(missing_ok=True)
        results = cls(folder, deadline)
        if commit:
            results._report.machine["commit"] = commit
        results.save()
        return results

    def set_machine(self, title: str, gpu: str = "") -> None:
        """Say where it is measured."""
        self._report.title = title
        if gpu:
            self._report.machine["gpu"] = gpu
        self.save()

    def add(self, name: str, samples: Samples) -> Samples:
        """Add measured values, and save; return them.

        Raises:
            OutOfTimeError: They are saved, and the budget is used up.
        """
        self.samples[name] = {"values": samples.values, "unit": samples.unit}
        self._say(f"{name}: {samples}")
        self.check_time()
        return samples

    def add_one(self, name: str, value: float, unit: str) -> None:
        """Add a single value."""
        self.add(name, Samples((value,), unit))

    def add_error(self, name: str, error: float, bound: float) -> None:
        """Add an error, and what it may be."""
        self.errors[name] = {"error": error, "bound": bound}
        self._say(f"{name}: error {error:.2g}, at most {bound:g}{'' if error <= bound else ': TOO MUCH'}")

    def add_fact(self, name: str, value: Any) -> None:
        """Add what isn't a sample."""
        self.facts[name] = value
        self._say(f"{name}: {value}")

    def note(self, section: str, sentence: str) -> None:
        """Add a sentence."""
        self.notes.setdefault(section, []).append(sentence)
        self._say(f"{section}: {sentence}")

    def measure(self, name: str, function: Callable[[], object], clock: Callable[[], float], **options: Any) -> Samples:
        """Add the seconds of a function's calls; the options are those of `report.measure`."""
        self.check_time()
        return self.add(name, measure(function, clock, **options))

    def check_time(self, seconds: float = 0.0) -> None:
        """Raise OutOfTimeError unless so many seconds are left."""
        if self.left < seconds:
            raise OutOfTimeError(f"{max(0.0, self.left):.0f} s were left")

    @property
    def left(self) -> float:
        """Seconds until the budget ends."""
        return self._deadline - time.time()

    def save(self) -> None:
        """Write both files anew."""
        self._report.tables = self.tables()
        for path, text in (
            (self.json_file, self._report.to_json()),
            (self.markdown_file, self._report.to_markdown()),
        ):
            unfinished = path.with_name(f".{path.name}")
            unfinished.write_text(text)
            unfinished.replace(path)

    def tables(self) -> list[Table]:
        """Return what is measured so far, for people."""
        return make_tables(self.samples, self.errors, self.facts, self.notes)

    def _say(self, sentence: str) -> None:
        print(f"[{time.time() - self._started:5.1f} s in, {self.left:4.0f} s left] {sentence}", flush=True)
        self.save()

    def _read(self) -> Report:
        if not self.json_file.exists():
            return Report(NAME, "A request on a GPU", COMMAND, machine=describe_machine())
        saved = json.loads(self.json_file.read_text())
        kept = {key: saved[key] for key in ("name", "title", "command", "measurements", "machine")}
        return Report(**kept)
