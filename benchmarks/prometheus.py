"""A server's `/metrics`, read without a client's library."""

import asyncio
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 120.0
POLL_S = 0.05
_LINE = re.compile(r"^(?P<name>\w+)\{(?P<labels>.*)\} (?P<value>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Metrics:
    """What `/metrics` said at one moment.

    Attributes:
        samples: Name, labels and value of each.
    """

    samples: tuple[tuple[str, frozenset[tuple[str, str]], float], ...]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of all samples of a name that have these labels."""
        wanted = set(labels.items())
        return sum(value for found, has, value in self.samples if found == name and wanted <= has)

    def by(self, name: str, label: str) -> Counter[str]:
        """Return the whole numbers of a counter by one of its labels, without zeros."""
        counts: Counter[str] = Counter()
        for found, has, value in self.samples:
            if found == name and value:
                counts[dict(has)[label]] += int(value)
        return counts

    def arrived(self, model: str) -> float:
        """Return how many requests Triton has handed to a model, whatever became of them."""
        return self.total("nv_inference_request_success", model=model) + self.total(
            "nv_inference_request_failure", model=model
        )


def read_metrics(address: str) -> Metrics:
    """Read the metrics at `HOST:PORT`."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_S) as response:
        text = response.read().decode()
    return Metrics(
        tuple(
            (match["name"], frozenset(_LABEL.findall(match["labels"])), float(match["value"]))
            for match in _LINE.finditer(text)
        )
    )


ROWS = ("audioldm2_admission_rows", "audioldm2_unet_requests_in_flight", "audioldm2_unet_requests_waiting")
"""Gauges of what is denoised, or will be."""
LIVE = (*ROWS, "audioldm2_admission_tokens", "audioldm2_admission_seconds")
"""Gauges of all that is live: they are 0 where nobody waits and nothing is computed."""


async def until_zero(address: str, gauges: Sequence[str] = LIVE) -> float:
    """Wait until gauges are 0; return the seconds.

    Raises:
        TimeoutError: Something stays.
    """
    start = time.perf_counter()
    async with asyncio.timeout(IDLE_TIMEOUT_S):
        while await asyncio.to_thread(_total, address, gauges):
            await asyncio.sleep(POLL_S)
    return time.perf_counter() - start


def _total(address: str, gauges: Sequence[str]) -> float:
    metrics = read_metrics(address)
    return sum(metrics.total(name) for name in gauges)
