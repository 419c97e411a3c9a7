"""Triton's custom metrics, without Triton: what they are told is kept."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

FAMILIES: "weakref.WeakValueDictionary[str, RecordedFamily]" = weakref.WeakValueDictionary()


class RecordedFamily:
    """As Triton's `MetricFamily`: its metrics end with it."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, name: str, description: str, kind: str) -> None:
        assert description
        self.kind = kind
        self._metrics: list[weakref.ref[RecordedMetric]] = []
        FAMILIES[name] = self

    @property
    def metrics(self) -> "list[RecordedMetric]":
        """Those that are kept by somebody: Triton removes one with its Python object."""
        return [metric for reference in self._metrics if (metric := reference())]

    def Metric(  # noqa: N802 - Triton's name
        self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None
    ) -> "RecordedMetric":
        metric = RecordedMetric(weakref.ref(self), self.kind, labels, buckets)
        self._metrics.append(weakref.ref(metric))
        return metric


class RecordedMetric:
    """Writes down what it is told; as in Triton, each kind takes other calls."""

    def __init__(
        self,
        family: "weakref.ref[RecordedFamily]",
        kind: str,
        labels: Mapping[str, str] | None,
        buckets: Sequence[float] | None,
    ) -> None:
        self._family, self._kind = family, kind
        self.labels, self.buckets = labels, buckets
        self.values: list[Any] = []

    def _add(self, value: float, *kinds: str) -> None:
        assert self._family() is not None, "Triton refuses: the family has been deleted"
        assert self._kind in kinds
        self.values.append(value)

    def increment(self, value: float) -> None:
        self._add(value, "counter", "gauge")

    def set(self, value: float) -> None:
        self._add(value, "gauge")

    def observe(self, value: float) -> None:
        self._add(value, "histogram")
