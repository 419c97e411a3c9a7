"""The form of all results: a JSON file in docs/benchmarks for each benchmark, and docs/benchmarks.md made from all.

`python -m benchmarks.report` writes docs/benchmarks.md anew.
"""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
LOSSES = RESULTS / "losses.md"
"""What the figures say against this project: written by hand, and put first."""
PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu", "nvidia-pytriton", "tritonclient")


@dataclass(frozen=True)
class Samples:
    """Measured values of one quantity.

    Attributes:
        values: As they came.
        unit: Of the values, such as `s`.
    """

    values: tuple[float, ...]
    unit: str

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{self.median:.3g} {self.unit}"
        return (
            f"{self.median:.3g} {self.unit} ({min(self.values):.3g} to {max(self.values):.3g}, n = {len(self.values)})"
        )


@dataclass(frozen=True)
class Table:
    """What a benchmark found.

    Attributes:
        title: What is compared.
        columns: Their headings.
        rows: The cells, as text.
        note: What a reader must know to read it, a paragraph.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """Curves of what a benchmark found.

    Attributes:
        title: What is compared.
        x_label: Quantity and unit.
        y_label: Quantity and unit.
        curves: Points by name.
        markers: Whether each point is a measurement of its own, to be marked.
    """

    title: str
    x_label: str
    y_label: str
    curves: dict[str, list[tuple[float, float]]]
    markers: bool = False


@dataclass
class Report:
    """One benchmark's results.

    Attributes:
        name: Of the JSON file.
        title: A heading.
        command: That makes it again.
        tables: For people.
        plots: For people.
        measurements: For programs: what the tables were made from, by name, without single requests.
        machine: Where it ran.
    """

    name: str
    title: str
    command: str
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: describe_machine())

    def add(self, table: Table) -> None:
        """Add a table, and print it."""
        self.tables.append(table)
        print("\n".join(_markdown(table)), flush=True)

    def save(self) -> None:
        """Write the JSON file and the plots, whose points are in their SVG files alone, and docs/benchmarks.md anew."""
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{self.name}.json").write_text(self.to_json())
        for number, plot in enumerate(self.plots):
            _draw(plot, RESULTS / _plot_file(self.name, number))
        DOCUMENT.write_text(make_document())

    def to_json(self) -> str:
        """Return what `save` writes into the JSON file."""
        result = asdict(self) | {"plots": [{"title": plot.title} for plot in self.plots]}
        return json.dumps(result, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Return its part of docs/benchmarks.md."""
        return "\n".join(_part(json.loads(self.to_json()))) + "\n"


def measure(
    function: Callable[[], object],
    clock: Callable[[], float],
    *,
    repeats: int,
    warm_up: int = 1,
    before: Callable[[], object] = lambda: None,
) -> Samples:
    """Return the seconds of `repeats` calls after `warm_up` calls.

    Args:
        function: What is measured.
        clock: Seconds; it waits for the device, where there is one.
        repeats: Calls that count.
        warm_up: Calls that don't.
        before: Called before each, outside of the clock.
    """
    for _ in range(warm_up):
        before()
        function()
    seconds = []
    for _ in range(repeats):
        before()
        start = clock()
        function()
        seconds.append(clock() - start)
    return Samples(tuple(seconds), "s")


def describe_machine() -> dict[str, Any]:
    """Return commit, date, processor, memory and versions."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "versions": {package: number for package in PACKAGES if (number := _version(package))},
    }


def make_document() -> str:
    """Return docs/benchmarks.md, from the JSON files."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    lines = [
        "# Benchmarks",
        "",
        "Made by `python -m benchmarks.report` from the JSON files in `docs/benchmarks`; don't edit it. Every figure",
        "is a measurement on the machine that stands beside it; a ratio compares two figures of the same run.",
        "",
        LOSSES.read_text().rstrip(),
    ]
    for report in reports:
        lines += ["", *_part(report)]
    return "\n".join(lines) + "\n"


def _part(report: dict[str, Any]) -> list[str]:
    """Return what the document says of one report."""
    machine = report["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    lines = [f"## {report['title']}", "", f"`{report['command']}`", ""]
    lines += [
        f"{gpu}{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"Python {machine['python']}, {versions}; commit {machine['commit']}, {machine['date']}."
    ]
    for table in report["tables"]:
        lines += ["", *_markdown(Table(**table))]
    for number, plot in enumerate(report.get("plots", [])):
        lines += ["", f"![{plot['title']}](benchmarks/{_plot_file(report['name'], number)})"]
    return lines


def _markdown(table: Table) -> list[str]:
    lines = [f"### {table.title}", ""]
    if table.note:
        lines += [table.note, ""]
    rows: Sequence[Sequence[str]] = table.rows
    lines += [_row(table.columns), "|" + "---|" * len(table.columns), *map(_row, rows)]
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plot_file(report: str, number: int) -> str:
    return f"{report}_{number}.svg"


def _draw(plot: Plot, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = plot.title  # equal points, equal file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, points in plot.curves.items():
        axes.plot(*zip(*points, strict=True), marker="o" if plot.markers else None, label=name)
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def commit() -> str:
    """Return the commit, with a plus where files have changed since; documents don't count."""
    changed = _git("status", "--porcelain", "--", ".", ":!docs")
    return (_git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S607


def _processor() -> str:
    """Return name, family and model: the name alone doesn't tell generations of a processor apart."""
    pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    if "model name" not in facts:
        return platform.machine()
    numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return ", ".join([facts["model name"], *numbers])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    DOCUMENT.write_text(make_document())
