"""The tables that are made of the figures, whatever of them is there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.ways import (
    COMPILED_HALF,
    DIFFUSERS_COMPILED,
    EAGER_FP32,
    GUIDED,
    LOOPS,
    OURS_COMPILED,
    OURS_GRAPHS,
    OURS_ONNX,
    OURS_SERVED,
    OURS_TORCH,
    REQUESTS,
    UNGUIDED,
)
from benchmarks.report import Samples, Table

NOT_MEASURED = "not measured"
MANY = 16
"""Requests at once, of the goals."""


@dataclass(frozen=True)
class Figures:
    """What was measured; the names of the attributes are those of Results."""

    samples: Mapping[str, Mapping[str, Any]]
    errors: Mapping[str, Mapping[str, float]]
    facts: Mapping[str, Any]
    notes: Mapping[str, list[str]]

    def get(self, name: str) -> Samples | None:
        """Return what was measured under a name, if it was."""
        found = self.samples.get(name)
        return Samples(tuple(found["values"]), found["unit"]) if found else None

    def median(self, name: str) -> float | None:
        """Return the same's median."""
        found = self.get(name)
        return found.median if found else None

    def below(self, prefix: str) -> list[tuple[str, Samples]]:
        """Return what was measured under names that begin so, without that beginning."""
        names = [name for name in self.samples if name.startswith(prefix)]
        return [(name.removeprefix(prefix), found) for name in names if (found := self.get(name))]


@dataclass(frozen=True)
class Goal:
    """What is to be reached.

    Attributes:
        name: Of a ratio or a time.
        wanted: Its bound.
        is_least: Whether the bound is the least; else it is the most.
        value: Finds what was measured, and how.
    """

    name: str
    wanted: float
    is_least: bool
    value: Callable[[Figures], tuple[float, str] | None]


def make_tables(
    samples: Mapping[str, Mapping[str, Any]],
    errors: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, Any],
    notes: Mapping[str, list[str]],
) -> list[Table]:
    """Return those tables for which there is at least a row."""
    figures = Figures(samples, errors, facts, notes)
    makers = (_goals, _correctness, _machine, _one_request, _many, _whole, _stages, _starts, _kernels, _memory, _notes)
    return [table for table in (maker(figures) for maker in makers) if table.rows]


def is_correct(errors: Mapping[str, Mapping[str, float]]) -> bool:
    """Say whether all that was compared is within its bound."""
    return all(found["error"] <= found["bound"] for found in errors.values())


GOALS = (
    Goal(
        "the loop, with guidance: times as fast as diffusers' eager fp32", 6.0, True, lambda f: _faster(f, EAGER_FP32)
    ),
    Goal("the same: times as fast as diffusers' compiled fp16", 1.3, True, lambda f: _faster(f, COMPILED_HALF)),
    Goal("a whole request: of the time of diffusers with a compiled fp16 UNet", 0.5, False, lambda f: _whole_ratio(f)),
    Goal(f"{MANY} requests without guidance: times the clips/s of one", 4.0, True, lambda f: _gain(f, UNGUIDED)),
    Goal(f"{MANY} requests with guidance: times the clips/s of one", 3.0, True, lambda f: _gain(f, GUIDED)),
    Goal("a cold start: seconds to the first answer", 60.0, False, lambda f: _cold(f)),
)


def _goals(figures: Figures) -> Table:
    rows = []
    for goal in GOALS:
        found = goal.value(figures)
        wanted = f"{'at least' if goal.is_least else 'at most'} {goal.wanted:g}"
        if not found:
            rows.append((goal.name, wanted, NOT_MEASURED, ""))
            continue
        value, how = found
        is_met = value >= goal.wanted if goal.is_least else value <= goal.wanted
        rows.append((goal.name, wanted, f"{value:.2f} ({how})", "met" if is_met else "**missed**"))
    return Table("Goals", ("", "goal", "measured", ""), tuple(rows), note="Official size, 10.24 s, 20 DPM++ 2M steps.")


def _faster(figures: Figures, peer: str) -> tuple[float, str] | None:
    """Return how much faster the best of ours is than a peer, one request with guidance."""
    reference = figures.median(f"loop/{peer}/{GUIDED}/1")
    for way in (OURS_COMPILED, OURS_GRAPHS):
        ours = figures.median(f"loop/{way}/{GUIDED}/1")
        if ours and reference:
            return reference / ours, way
    return None


def _gain(figures: Figures, guidance: str) -> tuple[float, str] | None:
    """Return the throughput of many requests against that of one."""
    for way in (OURS_COMPILED, OURS_GRAPHS):
        one, many = (figures.median(f"loop/{way}/{guidance}/{count}") for count in (1, MANY))
        if one and many:
            return MANY * one / many, way
    return None


def _whole_ratio(figures: Figures) -> tuple[float, str] | None:
    reference = figures.median(f"request/{DIFFUSERS_COMPILED}")
    for way in (OURS_SERVED, OURS_ONNX, OURS_TORCH):
        ours = figures.median(f"request/{way}")
        if ours and reference:
            return ours / reference, way
    return None


def _cold(figures: Figures) -> tuple[float, str] | None:
    seconds = figures.median("start/cold/the first answer")
    return (seconds, OURS_GRAPHS) if seconds else None


def _correctness(figures: Figures) -> Table:
    rows = [
        (name.replace("/", ", "), f"{found['error']:.1e}", f"{found['bound']:g}", _verdict(found))
        for name, found in figures.errors.items()
    ]
    return Table(
        "Correctness",
        ("", "error", "at most", ""),
        tuple(rows),
        note="Relative RMS against diffusers in fp32 (without TF32): of the latents after the whole loop, or of a "
        "request's audio.",
    )


def _verdict(found: Mapping[str, float]) -> str:
    return "" if found["error"] <= found["bound"] else "**too much**"


def _machine(figures: Figures) -> Table:
    rows = [(name, f"{found.median / 1e12:.3g} T{found.unit}") for name, found in figures.below("rate/")]
    flop = figures.facts.get("FLOP of a row's forward")
    rows += [("a row's forward", f"{flop / 1e9:.0f} GFLOP")] if flop else []
    plain = ("PyTorch", "GPUs", "Inductor can compile for a GPU", "dtype", "parameters of the UNet")
    rows += [(name, str(figures.facts[name])) for name in plain if name in figures.facts]
    moments = ("before", "after matrix products", "while serving", "at the end")
    rows += [(f"nvidia-smi {name}", _pairs(figures.facts[name])) for name in moments if name in figures.facts]
    return Table("The machine", ("", ""), tuple(rows))


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _one_request(figures: Figures) -> Table:
    rows = []
    for guidance in (GUIDED, UNGUIDED):
        reference = figures.median(f"loop/{EAGER_FP32}/{guidance}/1")
        for way in LOOPS:
            if found := figures.get(f"loop/{way}/{guidance}/1"):
                error = figures.errors.get(f"{way}/{guidance}")
                rows.append(
                    (
                        way,
                        guidance,
                        str(found),
                        f"{reference / found.median:.2f}" if reference else "",
                        f"{error['error']:.1e}" if error else "",
                    )
                )
    return Table(
        "The loop of one request",
        ("way", "guidance", "time", "times as fast as eager fp32", "error"),
        tuple(rows),
        note="Diffusers has text, noise and scheduler on the device when the clock starts, and leaves its latents "
        "there. Ours gets text from the CPU, draws the noise and brings the latents back within the time. fp32 is with "
        "PyTorch's defaults: on a GPU, convolutions are in TF32.",
    )


def _many(figures: Figures) -> Table:
    rows = []
    for key, found in figures.below("loop/"):
        way, guidance, count = key.rsplit("/", 2)
        one = figures.median(f"loop/{way}/{guidance}/1")
        rate = int(count) / found.median
        staggered = figures.get(f"staggered/{key}")
        if int(count) > 1 or staggered:
            rows.append(
                (
                    way,
                    guidance,
                    count,
                    str(found),
                    f"{rate:.2f}",
                    _ratio(rate, one and 1 / one),
                    str(staggered) if staggered else "",
                    _ratio(staggered.median, one and 1 / one) if staggered else "",
                )
            )
    return Table(
        "The loops of many requests",
        ("way", "guidance", "at once", "time of all", "clips/s", "of one's", "one after the other", "of one's"),
        tuple(rows),
        note="Together: all start at once. One after the other: so many are kept running, each at another step. "
        "Diffusers' are one batch, whose requests can't come and go.",
    )


def _ratio(value: float, reference: float | None) -> str:
    return f"{value / reference:.2f}" if reference else ""


def _whole(figures: Figures) -> Table:
    reference = figures.median(f"request/{DIFFUSERS_COMPILED}")
    rows = [
        (way, "1", str(found), _ratio(found.median, reference))
        for way in REQUESTS
        if (found := figures.get(f"request/{way}"))
    ]
    for key, found in figures.below("together/"):
        way, count = key.rsplit("/", 1)
        one = figures.median(f"request/{way}")
        gain = f"{int(count) * one / found.median:.2f} times the clips/s of one" if one else ""
        rows.append((way, count, str(found), gain))
    return Table(
        "A whole request, from text to audio, with guidance",
        ("way", "at once", "time", "of diffusers' with a compiled UNet"),
        tuple(rows),
    )


def _stages(figures: Figures) -> Table:
    rows = []
    for key, found in figures.below("stage/"):
        stage, way = key.split("/", 1)
        error = figures.facts.get(f"error of {stage}, {way.removeprefix('PyTorch, ')}")
        rows.append((stage, way, str(found), "" if error is None else f"{error:.1e}"))
    return Table(
        "The other stages, one request with guidance",
        ("stage", "way", "time", "error"),
        tuple(rows),
        note="Served: Triton's compute time, for the UNet that of its forwards. ONNX Runtime: from and to the CPU's "
        "memory.",
    )


def _starts(figures: Figures) -> Table:
    rows = [(key.replace("/", ": "), str(found)) for key, found in figures.below("start/")]
    rows += [(f"compile: {key}", str(found)) for key, found in figures.below("compile/")]
    rows += [(key, str(found)) for key, found in figures.below("seconds/")]
    return Table(
        "Starts",
        ("", "time"),
        tuple(rows),
        note="Cold: weights from the disk, nothing compiled. Warm: with the cache of an earlier start. Both from the "
        "start of the process.",
    )


def _kernels(figures: Figures) -> Table:
    rows = []
    for name, use in figures.facts.items():
        if name.startswith("kernels/"):
            longest = ", ".join(f"{kernel[:40]} {100 * share:.0f} %" for kernel, share in use["longest"][:3])
            rows.append(
                (
                    name.removeprefix("kernels/").replace("/", ", "),
                    f"{use['per_step']:.0f}",
                    f"{use['busy_ms_per_step']:.2f} ms",
                    f"{100 * use['idle_share']:.0f} %",
                    longest.replace("|", "/"),
                )
            )
    return Table(
        "Kernels and idle time",
        ("way, guidance, at once", "kernels of a step", "busy", "idle", "the longest"),
        tuple(rows),
        note="By PyTorch's profiler, under which whoever starts kernels one by one is slower.",
    )


def _memory(figures: Figures) -> Table:
    rows = [(key.replace("/", ", "), f"{found.median:.0f} MiB") for key, found in figures.below("memory/")]
    return Table(
        "Memory",
        ("", ""),
        tuple(rows),
        note="What tensors occupy at most, where nothing else is said. What graphs need is in what PyTorch keeps.",
    )


def _notes(figures: Figures) -> Table:
    rows = [(section, sentence.replace("|", "/")) for section, said in figures.notes.items() for sentence in said]
    return Table("Notes", ("section", ""), tuple(rows))
