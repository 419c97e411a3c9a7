"""Compiles the UNet for one shape after the other while requests are served without.

It takes minutes on a GPU, and nobody waits for it: each shape is used from when it is done.

Compilers try kernels out, and wait for the whole GPU then. That breaks a capture of another thread, so captures and
compilations take turns.
"""

import threading
import time
from collections.abc import Callable, Sequence

from unet_shapes import FixedShape

MAX_FAILURES = 2
"""Of shapes: one may fail because of what runs beside it, and two because none can be compiled."""


class BackgroundCompiler:
    """A thread that ends when all is compiled, or when it is told to, after the present shape.

    Args:
        compile_shape: Compiles one; takes long.
        shapes: What to compile, the most useful first.
        on_done: Called after each, in this thread.
        report: Called with a sentence about each.
        turn: Held while a shape is compiled.
        pause_s: Left to others between two shapes.
    """

    def __init__(
        self,
        compile_shape: Callable[[FixedShape], object],
        shapes: Sequence[FixedShape],
        on_done: Callable[[FixedShape], object],
        report: Callable[[str], object],
        turn: threading.Lock,
        pause_s: float,
    ) -> None:
        self._compile, self._shapes, self._on_done, self._report = compile_shape, shapes, on_done, report
        self._turn, self._pause_s = turn, pause_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="background-compiler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Start no other shape. The thread is a daemon: what it compiles doesn't keep the process."""
        self._closing.set()

    def _run(self) -> None:
        failures = 0
        for index, shape in enumerate(self._shapes):
            if self._closing.wait(self._pause_s if index else 0):
                return
            started = time.perf_counter()
            try:
                with self._turn:
                    self._compile(shape)
            except Exception as error:  # it goes on as it is
                self._report(
                    f"{shape} can't be compiled ({type(error).__name__}: {str(error)[:300]}); it runs without."
                )
                failures += 1
                if failures == MAX_FAILURES:
                    return
                continue
            self._report(f"compiled {shape} (rows x frames x tokens) in {time.perf_counter() - started:.1f} s")
            self._on_done(shape)
