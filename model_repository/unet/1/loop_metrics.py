"""What the denoising loop counts, and how it reaches Triton's `/metrics`."""

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from denoising_errors import DenoisingError

ROWS_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass
class Counts:
    """What has happened.

    Attributes:
        steps: Scheduler steps that were done, of all requests.
        rows_of_forwards: Rows of each forward of the UNet.
        seconds_of_forwards: Seconds of each, with what the schedulers did after it.
        shortages: How often memory wasn't enough for a forward.
        requests: By outcome (`finished`, `failed`, `refused`, `cancelled`, `deadline`) and reason (`ok`, or the error's
            class).
    """

    steps: int = 0
    rows_of_forwards: list[int] = field(default_factory=list)
    seconds_of_forwards: list[float] = field(default_factory=list)
    shortages: int = 0
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, other: "Counts") -> None:
        """Add what else has happened."""
        self.steps += other.steps
        self.rows_of_forwards += other.rows_of_forwards
        self.seconds_of_forwards += other.seconds_of_forwards
        self.shortages += other.shortages
        self.requests += other.requests


class LoopMetrics:
    """Counts what happens in the loop, until the counts are taken. Safe to be used by several threads."""

    def __init__(self) -> None:
        self._counts = Counts()
        self._lock = threading.Lock()

    def count_forward(self, rows: int, seconds: float, steps: int) -> None:
        """Count one forward, and the scheduler steps that it completed."""
        with self._lock:
            self._counts.steps += steps
            self._counts.rows_of_forwards.append(rows)
            self._counts.seconds_of_forwards.append(seconds)

    def count_shortage(self) -> None:
        """Count a forward for which memory wasn't enough."""
        with self._lock:
            self._counts.shortages += 1

    def count_request(self, error: DenoisingError | None) -> None:
        """Count a request that has ended."""
        with self._lock:
            key = (error.outcome, type(error).__name__) if error else ("finished", "ok")
            self._counts.requests[key] += 1

    def take(self) -> Counts:
        """Return what has happened since the last call."""
        with self._lock:
            taken, self._counts = self._counts, Counts()
            return taken


class PublishedMetrics:
    """Publishes the counts as metrics of Triton's.

    Each update is a round trip to the server: it isn't made in the loop, but from time to time for all that happened.

    Args:
        metrics: Where the numbers come from.
        metric_family: Triton's class `MetricFamily`, of the Python backend.
        labels: Of every metric, such as the model's name.
    """

    def __init__(self, metrics: LoopMetrics, metric_family: Any, labels: Mapping[str, str]) -> None:
        self._metrics, self._metric_family, self._labels = metrics, metric_family, dict(labels)
        self._unpublished = Counts()
        self._families: list[Any] = []  # Triton wants them to outlive their metrics

        def family(name: str, description: str, kind: Any) -> Any:
            self._families.append(metric_family(name=f"audioldm2_unet_{name}", description=description, kind=kind))
            return self._families[-1]

        counter, gauge, histogram = metric_family.COUNTER, metric_family.GAUGE, metric_family.HISTOGRAM
        self._steps = family("steps_total", "Scheduler steps of requests", counter).Metric(labels=self._labels)
        self._rows = family("rows_per_forward", "Rows of a forward of the UNet", histogram).Metric(
            labels=self._labels, buckets=list(ROWS_BUCKETS)
        )
        self._seconds = family("seconds_per_forward", "Seconds of a forward of the UNet", histogram).Metric(
            labels=self._labels, buckets=list(SECONDS_BUCKETS)
        )
        self._shortages = family("memory_shortages_total", "Forwards for which memory wasn't enough", counter).Metric(
            labels=self._labels
        )
        self._in_flight = family("requests_in_flight", "Requests that are being denoised", gauge).Metric(
            labels=self._labels
        )
        self._waiting = family("requests_waiting", "Requests in the queue", gauge).Metric(labels=self._labels)
        self._requests_family = family("requests_total", "Requests by outcome and reason", counter)
        self._requests: dict[tuple[str, str], Any] = {}

    def publish_choice(self, labels: Mapping[str, str]) -> None:
        """Publish how the UNet runs, in the labels of a gauge that is 1."""
        self._families.append(
            self._metric_family(
                name="audioldm2_unet_info",
                description="How the UNet runs, in the labels",
                kind=self._metric_family.GAUGE,
            )
        )
        self._info = self._families[-1].Metric(labels={**self._labels, **labels})
        self._info.set(1)

    def publish(self, in_flight: int, waiting: int) -> None:
        """Bring Triton's metrics up to date."""
        counts = self._unpublished
        counts.add(self._metrics.take())
        # Nothing is forgotten before it is published: where that fails, it is left for the next time.
        if counts.steps:
            self._steps.increment(counts.steps)
            counts.steps = 0
        if counts.shortages:
            self._shortages.increment(counts.shortages)
            counts.shortages = 0
        for histogram, values in ((self._rows, counts.rows_of_forwards), (self._seconds, counts.seconds_of_forwards)):
            while values:
                histogram.observe(values[0])
                del values[0]
        while counts.requests:
            (outcome, reason), count = next(iter(counts.requests.items()))
            self._request_metric(outcome, reason).increment(count)
            del counts.requests[outcome, reason]
        # Last: who sees that nothing is in flight any more, sees what has become of it as well.
        self._in_flight.set(in_flight)
        self._waiting.set(waiting)

    def _request_metric(self, outcome: str, reason: str) -> Any:
        if (outcome, reason) not in self._requests:
            labels = {**self._labels, "outcome": outcome, "reason": reason}
            self._requests[outcome, reason] = self._requests_family.Metric(labels=labels)
        return self._requests[outcome, reason]
