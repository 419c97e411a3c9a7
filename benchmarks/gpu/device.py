"""How time, memory and kernels are measured on a device; on a CPU the same functions rehearse it."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
_ACTIVITIES = {"cuda": ProfilerActivity.CUDA, "cpu": ProfilerActivity.CPU}


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock that waits for the device first."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


@dataclass(frozen=True)
class KernelUse:
    """What a call does on the device.

    Attributes:
        count: Kernels and copies.
        span_s: From the first one's beginning to the last one's end.
        busy_s: When at least one ran.
        longest: Names of those that took the most time altogether, with their share of the time of all.
    """

    count: int
    span_s: float
    busy_s: float
    longest: list[tuple[str, float]]

    @property
    def idle_share(self) -> float:
        """Of the span."""
        return 1 - self.busy_s / self.span_s if self.span_s else 0.0


def kernel_use(call: Callable[[], object], device: torch.device) -> KernelUse:
    """Return what a call does, by PyTorch's profiler; the call itself is slower meanwhile."""
    on_gpu, clock = device.type == "cuda", clock_of(device)
    # A GPU's kernels are seen whatever thread has started them.
    threads = None if on_gpu else _ExperimentalConfig(profile_all_threads=True)
    for _ in range(2):  # the first one starts the profiler's own machinery
        clock()
        with profile(activities=[_ACTIVITIES[device.type]], experimental_config=threads) as profiled:
            call()
            clock()
    events = [
        event for event in profiled.events() if event.device_type.name == device.type.upper() and not event.cpu_children
    ]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    if not spans:
        raise RuntimeError("the profiler has seen nothing on the device")
    seconds: Counter[str] = Counter()
    for event in events:
        seconds[event.name] += event.time_range.elapsed_us() / 1e6
    total = sum(seconds.values())
    return KernelUse(
        count=len(spans),
        span_s=(max(end for _, end in spans) - spans[0][0]) / 1e6,
        busy_s=_union(spans) / 1e6,
        longest=[(name, value / total) for name, value in seconds.most_common(8)],
    )


def _union(spans: list[tuple[float, float]]) -> float:
    """Return the length of all spans together, sorted by their beginnings; what overlaps counts once."""
    total, reached = 0.0, spans[0][0]
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Memory:
    """The memory of this process on a device, in MiB; on a CPU its main memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> float:
        """Return what tensors occupy."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) / MIB
        return _status_mib("VmRSS")

    def reserved(self) -> float:
        """Return what PyTorch keeps, with what it has no tensors in."""
        if self._device.type == "cuda":
            return torch.cuda.memory_reserved(self._device) / MIB
        return _status_mib("VmRSS")

    def of_all(self) -> float:
        """Return what all processes occupy, with libraries and contexts."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return (total - free) / MIB
        return _status_mib("VmRSS")

    def peak_of(self, call: Callable[[], object]) -> float:
        """Return the most that tensors occupy during a call."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        call()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) / MIB
        return _status_mib("VmHWM")


def relative_rms(actual: Any, expected: Any) -> float:
    """Return the error of a tensor against another one, both on the CPU; infinite where a number isn't finite."""
    if not torch.isfinite(actual).all():
        return float("inf")
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise LookupError(field)
