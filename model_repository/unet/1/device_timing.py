"""Moments in a device's work: on a CPU the clock's, on a GPU events in the order of what it computes.

A GPU works behind the thread that tells it what to do. Asking for the time there must not make that thread wait.
"""

import time
from collections.abc import Callable
from typing import Protocol, Self

import torch


class Moment(Protocol):
    """When the device has done what it was told before."""

    def wait(self) -> None:
        """Wait until then, and no longer: what it was told later goes on."""

    def seconds_since(self, earlier: Self) -> float:
        """Return the seconds between two moments that have passed."""


class ClockMoment:
    """On a CPU: it has done what it was told when it is told the next.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._now = clock()

    def wait(self) -> None:
        """Do nothing."""

    def seconds_since(self, earlier: "ClockMoment") -> float:
        """Return the seconds between both."""
        return self._now - earlier._now


class CudaMoment:
    """On a GPU, in the present stream of its device."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        """Wait for the event.

        Raises:
            RuntimeError: A kernel before it has failed.
        """
        self._event.synchronize()

    def seconds_since(self, earlier: "CudaMoment") -> float:
        """Return the seconds between both, as the GPU has measured them."""
        return earlier._event.elapsed_time(self._event) / 1000


def moments_of(device: torch.device, clock: Callable[[], float]) -> Callable[[], Moment]:
    """Return what makes moments on a device.

    Args:
        device: Where the work is done.
        clock: Seconds, for a CPU.
    """
    return CudaMoment if device.type == "cuda" else lambda: ClockMoment(clock)
