"""The UNet as the options and the device want it: the type of its numbers, compiled, and with CUDA graphs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from background_compiler import BackgroundCompiler
from device_choice import use_device
from device_defaults import GRAPH_ROWS, Choice, choose
from fixed_shape_forward import allow_compiled_shapes
from loop_options import LoopOptions
from tick_graphs import TickGraphs
from unet_forward import UNetForward, default_frames
from unet_precision import load_in_the_first_that_holds
from unet_shapes import NUM_BINS, NUM_VECTORS, FixedShape

PAUSE_S = 3.0
"""Between two shapes that are compiled: an idle loop looks every second whether it may capture."""


class PreparedUNet:
    """Loads the UNet, and makes it fast: as much before the first request as takes seconds, the rest behind them.

    Args:
        folder: Of the checkpoint's UNet.
        device: Where it runs.
        options: What is asked for.
        report: Called with a sentence about what is chosen and made.

    Attributes:
        choice: What was chosen, once it is loaded.
        unet: The UNet, once it is loaded.
    """

    choice: Choice
    unet: UNetForward

    def __init__(
        self, folder: Path, device: torch.device, options: LoopOptions, report: Callable[[str], object]
    ) -> None:
        self._folder, self._device, self._options, self._report = folder, device, options, report
        self._graphs: TickGraphs | None = None
        self._compiler: BackgroundCompiler | None = None

    def load(self) -> UNetForward:
        """Load it; without CUDA graphs, what is to be compiled is compiled then. In the thread that will use it."""
        use_device(self._device)
        self.choice = choose(self._options, self._device, default_frames(self._folder))
        self.unet = load_in_the_first_that_holds(self._load_in, self.choice.dtypes, self._report)
        for name, value in self.choice.describe(self.unet.dtype).items():
            self._report(f"{name} {value}")
        if not self.choice.uses_graphs:
            self._compile(*self.choice.shapes)
        return self.unet

    def make_graphs(self, unet: UNetForward) -> TickGraphs | None:
        """Return the keeper of CUDA graphs, in the same thread; None where there are none."""
        if not self.choice.uses_graphs:
            return None
        shapes = self.choice.shapes
        allow_compiled_shapes(len(shapes))
        rows = sorted({shape.rows for shape in shapes} or {min(rows, self._options.max_rows) for rows in GRAPH_ROWS})
        max_frames = self._options.max_frames_per_forward(self._device)
        sizes = {
            ((unet.sizes.num_channels, shape.frames, NUM_BINS, NUM_VECTORS), shape.tokens): None for shape in shapes
        }
        self._graphs = TickGraphs(unet.forward_at, unet.dtype, tuple(rows), max_frames, self._report, sizes)
        return self._graphs

    def compile_in_background(self) -> None:
        """Compile for a GPU while requests are served; a graph is made anew when its shape is done."""
        if not self.choice.compile_backend or self._graphs is None:
            return
        most_useful_first = sorted(self.choice.shapes, key=lambda shape: (shape.rows != 2, shape.rows))
        self._compiler = BackgroundCompiler(
            self._compile_on_gpu,
            most_useful_first,
            self._graphs.note_faster_forward,
            self._report,
            self._graphs.turn,
            PAUSE_S,
        )

    def close(self) -> None:
        """Compile nothing more."""
        if self._compiler is not None:
            self._compiler.close()

    def _load_in(self, dtype: torch.dtype | None) -> UNetForward:
        return UNetForward.load(self._folder, self._device, self._options.text_buckets[-1], dtype)

    def _compile_on_gpu(self, shape: FixedShape) -> None:
        use_device(self._device)
        self._compile(shape)

    def _compile(self, *shapes: FixedShape) -> None:
        prepared = replace(
            self._options.preparation,
            compile_backend=self.choice.compile_backend,
            cuda_graphs="on" if self.choice.uses_graphs else "off",
            fixed_shapes=shapes,
        )
        for shape, seconds in self.unet.prepare(prepared):
            self._report(f"prepared {shape} (rows x frames x tokens) in {seconds:.1f} s")
