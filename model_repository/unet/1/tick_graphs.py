"""CUDA graphs of whole ticks: gather, UNet, guidance and the steps of all table schedulers, started by one call.

A UNet of the official size is more than a thousand kernels, each shorter than Python takes to start it. A graph starts
them all. It has the addresses of its tensors in it: DenoisingBatch keeps them where they are.

A graph is made for a number of rows, a size of latents, and a number of tokens; fewer rows and tokens are filled up.
Sizes other than the prepared ones get theirs when they were asked for twice and nobody waits; of too many, those that
weren't used for the longest time go.
"""

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from denoising_batch import DenoisingBatch, Predict, Version
from torch import Tensor
from unet_shapes import FixedShape

MAX_ERROR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of a replay, against the same forward without a graph: relative RMS. What differs by more isn't used."""

WARM_UPS = 2
"""Forwards before a capture: the first may compile, the second lets libraries choose their kernels."""

MAX_SIZES = 4
"""Sizes of latents and tokens that have graphs at a time."""

OFTEN = 2
"""So often a size must be asked for before it gets graphs."""

MOST_FILLING = 2
"""Rows of a forward for each that is seated, at most: with more to fill up, a forward without a graph is faster."""

MAX_FAILURES = 3
"""So often graphs of a size may fail before they are given up."""

MIN_FREE_MEMORY = 0.1
"""Of the GPU's: with less of it left, nothing more is captured."""

Size = tuple[tuple[int, int, int, int], int]
"""The key of jobs (channels, frames and bins of their latents, and GPT-2's vectors), and tokens."""


class GraphError(Exception):
    """A graph doesn't compute what it was made from."""


class TickGraph:
    """One graph, over the tensors of a batch.

    Args:
        batch: Its rows are blank while the graph is made.
        predict: The UNet.
        rows: Of its forward.
        tokens: T5 states of a row.
        pool: Of memory. All graphs share it, for one runs at a time.
        dtype: The UNet's.

    Raises:
        GraphError: It doesn't give what the forward gives without it.
    """

    def __init__(
        self, batch: DenoisingBatch, predict: Predict, rows: int, tokens: int, pool: Any, dtype: torch.dtype
    ) -> None:
        self._graph = torch.cuda.CUDAGraph()
        present = torch.cuda.current_stream()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(present)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                batch.forward_and_advance(predict, rows, tokens)
        present.wait_stream(stream)
        try:
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                noise_pred = batch.forward_and_advance(predict, rows, tokens)
        finally:
            torch.cuda.set_stream(present)  # a capture that fails in its end leaves its own
        batch.randomize()  # so that what the capture has left behind isn't taken for a replay's
        expected = batch.forward_and_advance(predict, rows, tokens)
        self.replay()
        error = relative_rms(noise_pred, expected)
        if not error <= MAX_ERROR[dtype]:
            raise GraphError(f"a replay differs from its forward by {error:.2g} (relative RMS)")

    def replay(self) -> None:
        """Do a tick for whoever is seated."""
        self._graph.replay()


@dataclass
class _GraphsOfSize:
    """Those of one size of latents and tokens.

    Attributes:
        version: Of the batch's tensors, which they have in them.
        by_rows: The graphs.
    """

    version: Version | None
    by_rows: dict[int, TickGraph] = field(default_factory=dict)


class TickGraphs:
    """The graphs of a UNet, made when nobody waits.

    Args:
        predict_of: Returns the fastest forward that there is for a shape.
        dtype: The UNet's.
        rows: Numbers of rows that are captured, in rising order.
        max_frames: Rows x latent frames of a forward, at most.
        report: Called with a sentence about what was made, or why not.
        sizes: What is captured first.

    Attributes:
        turn: Held while something is captured, and while something is compiled: that may take minutes, and who captures
            doesn't wait for it.
    """

    def __init__(
        self,
        predict_of: Callable[[FixedShape], Predict],
        dtype: torch.dtype,
        rows: tuple[int, ...],
        max_frames: int,
        report: Callable[[str], object],
        sizes: Iterable[Size] = (),
    ) -> None:
        self.turn = threading.Lock()
        self._predict_of, self._dtype, self._report = predict_of, dtype, report
        self._rows, self._max_frames = rows, max_frames
        self._graphs: OrderedDict[Size, _GraphsOfSize] = OrderedDict()  # the last one used last
        self._asked: dict[Size, int] = dict.fromkeys(sizes, OFTEN)
        self._failures: Counter[Size] = Counter()
        self._missing: deque[tuple[Size, int]] = deque()
        self._outdated: deque[FixedShape] = deque()  # filled by another thread
        self._pool = torch.cuda.graph_pool_handle()

    def rows_of(self, size: Size) -> tuple[int, ...]:
        """Return the rows of a size's graphs, in rising order: those that a forward may have."""
        frames = size[0][1]
        return tuple(rows for rows in self._rows if rows * frames <= self._max_frames) or self._rows[:1]

    def find(self, batch: DenoisingBatch, key: tuple[int, int, int, int]) -> TickGraph | None:
        """Return the smallest graph with room for those that are seated; None if there is none."""
        for size in [size for size in self._graphs if size[0] == key]:
            if self._graphs[size].version != batch.reserved_version(size[1]):  # larger tensors have taken the place
                self._ask_again(size)
        present = next((size for size, graphs in self._graphs.items() if graphs.version == batch.version), None)
        if present is None:
            return None
        self._graphs.move_to_end(present)
        seated, graphs = len(batch.rows), self._graphs[present].by_rows
        rows = min((rows for rows in graphs if seated <= rows <= MOST_FILLING * seated), default=0)
        return graphs.get(rows)

    def ask_for(self, key: tuple[int, int, int, int], tokens: int) -> None:
        """Note that a job of a size has come."""
        if self._find_size(key, tokens) is None and self._failures[key, tokens] < MAX_FAILURES:
            self._asked[key, tokens] = self._asked.get((key, tokens), 0) + 1

    def tokens_of(self, key: tuple[int, int, int, int]) -> set[int]:
        """Return the tokens of a key's graphs; while there are any, they need its batch."""
        return {size[1] for size in self._graphs if size[0] == key}

    def next_wanted(self) -> Size | None:
        """Return a size that was asked for twice, and has no graphs."""
        return next((size for size, count in self._asked.items() if count >= OFTEN), None)

    def note_faster_forward(self, shape: FixedShape) -> None:
        """Say, from any thread, that a shape has a faster forward by now: its graph is made anew when nobody waits."""
        self._outdated.append(shape)

    def next_outdated(self) -> tuple[Size, int] | None:
        """Return the size and the rows of a graph that is to be made, or made anew, if any; it is returned once."""
        while self._outdated:
            shape = self._outdated.popleft()
            for size in self._graphs:
                if (size[0][1], size[1]) == (shape.frames, shape.tokens) and shape.rows in self.rows_of(size):
                    self._missing.append((size, shape.rows))
        while self._missing:
            size, rows = self._missing.popleft()
            if size in self._graphs:
                return size, rows
        return None

    def drop(self, size: Size, error: Exception) -> None:
        """Part with the graphs of a size of which one couldn't be made; it is tried again, but not for ever."""
        self._failures[size] += 1
        self._graphs.pop(size, None)
        self._asked.pop(size, None)
        if self._failures[size] < MAX_FAILURES:
            self._asked[size] = OFTEN
        self._report(f"no CUDA graphs for {_name(size)} ({type(error).__name__}: {error}).")

    def make_anew(self) -> None:
        """Use none of the graphs any more, and make them again."""
        for size in list(self._graphs):
            self._ask_again(size)

    def _ask_again(self, size: Size) -> None:
        del self._graphs[size]
        self._asked[size] = OFTEN

    def begin(self, batch: DenoisingBatch, size: Size) -> None:
        """Have graphs of a size from now on, made one by one, the largest first; of too many sizes, one goes."""
        self._asked.pop(size, None)
        if not _has_memory():
            self._report(f"no CUDA graphs for {_name(size)}: the GPU's memory is nearly used up.")
            return
        self._graphs.pop(size, None)
        while len(self._graphs) >= MAX_SIZES:
            self._graphs.popitem(last=False)
        self._graphs[size] = _GraphsOfSize(batch.reserved_version(size[1]))
        self._missing = deque(entry for entry in self._missing if entry[0] != size)
        self._missing.extend((size, rows) for rows in reversed(self.rows_of(size)))

    def capture(self, batch: DenoisingBatch, size: Size, rows: int) -> None:
        """Make one graph of a size, whose batch is blank. What can't be made is reported, and not used."""
        started = time.perf_counter()
        (_, frames, *_), tokens = size
        if self._graphs[size].version != batch.reserved_version(tokens):  # larger tensors have taken the place
            self.begin(batch, size)
            return
        try:
            predict = self._predict_of(FixedShape(rows, frames, tokens))
            graph = TickGraph(batch, predict, rows, tokens, self._pool, self._dtype)
        except (GraphError, torch.OutOfMemoryError) as error:
            self._report(f"no CUDA graph for {rows} rows of {_name(size)}: {error}.")
        else:
            self._graphs[size].by_rows[rows] = graph
            self._report(f"captured {rows} rows of {_name(size)} in {time.perf_counter() - started:.2f} s")

    def _find_size(self, key: tuple[int, int, int, int], tokens: int) -> Size | None:
        return next((size for size in self._graphs if size[0] == key and size[1] >= tokens), None)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Return the root of the mean squared difference, of that of what was expected."""
    difference = (actual.float() - expected.float()).square().mean()
    return float((difference / expected.float().square().mean()).sqrt())


def _has_memory() -> bool:
    torch.cuda.empty_cache()  # what PyTorch keeps for later isn't used; nothing runs now
    free, total = torch.cuda.mem_get_info()
    return free >= MIN_FREE_MEMORY * total


def _name(size: Size) -> str:
    return f"{size[0][1]} frames and {size[1]} tokens"
