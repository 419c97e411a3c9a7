"""Progress bars of the command line: only on a terminal, and removed at the end."""

import contextlib
import sys
from types import TracebackType
from typing import Any

from audioldm2_client._jobs import Progress

_WORDS = "{desc} [{elapsed}]"
_STEPS = "{desc} |{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}]"
_PROMPTS = "{desc} |{bar}| {n_fmt}/{total_fmt} prompts [{elapsed}<{remaining}]"


class GenerationBar:
    """Show queueing, steps and decoding of one generation; call it with each `Progress`."""

    def __init__(self, *, shown: bool) -> None:
        self._bar: Any = _make_bar(_WORDS, desc="waiting", total=1) if shown else None

    def __call__(self, progress: Progress) -> None:
        """Show the progress."""
        if self._bar is None:
            return
        with contextlib.suppress(OSError):  # a terminal that is gone ends nothing by itself: SIGHUP does
            self._show(progress)

    def _show(self, progress: Progress) -> None:
        self._bar.bar_format = _STEPS if progress.state == "denoising" else _WORDS
        self._bar.total = max(progress.total_steps, 1)
        self._bar.n = progress.step
        self._bar.set_description_str(_describe(progress), refresh=False)
        self._bar.refresh()

    def __enter__(self) -> "GenerationBar":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _close(self._bar)


class BatchBar:
    """Show how many prompts are done."""

    def __init__(self, *, total: int, done: int, shown: bool) -> None:
        self._bar: Any = _make_bar(_PROMPTS, desc="generating", total=total, initial=done) if shown else None

    def advance(self) -> None:
        """Count one more prompt."""
        if self._bar is not None:
            self._bar.update()

    def print(self, line: str, *, error: bool = False) -> None:
        """Print a line above the bar."""
        stream = sys.stderr if error else sys.stdout
        if stream is None:  # closed from the start; `print` would take the other one
            return
        if self._bar is None:
            print(line, file=stream, flush=True)
        else:
            self._bar.write(line, file=stream)

    def close(self) -> None:
        """Remove the bar."""
        _close(self._bar)


def is_terminal() -> bool:
    """Return whether a bar can be seen."""
    return sys.stderr is not None and sys.stderr.isatty()  # None: closed from the start


def _close(bar: Any) -> None:
    if bar is not None:
        with contextlib.suppress(OSError):
            bar.close()


def _describe(progress: Progress) -> str:
    if progress.state == "queued":
        return f"queued, {progress.requests_ahead} ahead" if progress.requests_ahead else "queued"
    return progress.state


def _make_bar(bar_format: str, **settings: Any) -> Any:
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own
    return tqdm(bar_format=bar_format, file=sys.stderr, leave=False, dynamic_ncols=True, **settings)
