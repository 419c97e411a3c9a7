"""What is told of whole requests on Triton's `/metrics`.

Each update is a round trip to the server, so they are made from time to time, away from the requests. Ensembles of one
server share the families, and differ by the label `model`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from admission import Budgets, Load
from live_requests import EndedRequest
from request_log import OUTCOMES

SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 600.0)
STAGES = ("queue", "text", "denoise", "decode", "total")

VERSION = "0.2.0"
"""Of this model repository: the client's, which it is released with (a test compares them)."""


def build_labels(record: Path) -> dict[str, str]:
    """Return what is served: version, checkpoint and exporter, as far as the export's record tells.

    Args:
        record: The file `checkpoint.json`, which the export writes.
    """
    try:
        exported = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        exported = {}
    if not isinstance(exported, dict):
        exported = {}
    checkpoint = str(exported.get("checkpoint", ""))
    name = Path(checkpoint).name if checkpoint.startswith("/") else checkpoint  # a folder's place is nobody's business
    return {"version": VERSION, "checkpoint": name, "exporter": str(exported.get("exporter", ""))}


class RequestMetrics:
    """Publishes what has ended and what is live.

    Args:
        metric_family: Triton's class `MetricFamily`, of the Python backend.
        model: The ensemble's name.
        budgets: Of what may be live.
        build: What `audioldm2_build_info` tells, by label.
    """

    def __init__(self, metric_family: Any, model: str, budgets: Budgets, build: Mapping[str, str]) -> None:
        self._families: list[Any] = []  # Triton wants them to outlive their metrics
        self._labels = {"model": model}

        def family(name: str, description: str, kind: Any) -> Any:
            self._families.append(metric_family(name=f"audioldm2_{name}", description=description, kind=kind))
            return self._families[-1]

        counter, gauge, histogram = metric_family.COUNTER, metric_family.GAUGE, metric_family.HISTOGRAM
        self._requests_family = family("requests_total", "Requests that are over, by outcome and reason", counter)
        self._requests = {reason: self._request_metric(reason) for reason in OUTCOMES}  # all of them from the start
        seconds = family("request_seconds", "Seconds that requests took, by stage", histogram)
        self._seconds = {
            stage: seconds.Metric(labels={**self._labels, "stage": stage}, buckets=list(SECONDS_BUCKETS))
            for stage in STAGES
        }
        audio = family("audio_seconds_total", "Seconds of audio that were delivered", counter)
        self._audio_s = audio.Metric(labels=self._labels)
        self._live = {
            name: family(f"admission_{name}", f"Live {what}", gauge).Metric(labels=self._labels)
            for name, what in (
                ("tokens", "tokens of text that aren't encoded"),
                ("rows", "rows that aren't denoised"),
                ("seconds", "seconds of audio that aren't delivered"),
            )
        }
        self._constant = []  # a metric that isn't kept goes
        for name, limit in _values(budgets.load).items():
            limits = family(f"admission_{name}_limit", f"How much audioldm2_admission_{name} may be", gauge)
            self._constant.append(limits.Metric(labels=self._labels))
            self._constant[-1].set(limit)
        info = family("build_info", "What is served, in the labels", gauge)
        self._constant.append(info.Metric(labels={**self._labels, **build}))
        self._constant[-1].set(1)
        self._published: dict[str, float] = {}

    def publish(self, ended: Sequence[EndedRequest], live: Load) -> None:
        """Count requests that have ended, and show what is live."""
        for reason, count in Counter(request.reason for request in ended).items():
            self._requests[reason].increment(count)
        for request in ended:
            self._observe(request)
        for name, value in _values(live).items():
            if self._published.get(name) != value:  # last: what isn't live any more, is counted
                self._live[name].set(value)
                self._published[name] = value

    def _observe(self, ended: EndedRequest) -> None:
        if OUTCOMES[ended.reason] == "refused":
            return  # the thousandth of a second that a refusal takes says nothing of the others
        for stage, seconds in ended.seconds.items():
            self._seconds[stage].observe(seconds)
        if ended.reason == "ok" and ended.request:
            self._audio_s.increment(ended.request.num_waveforms * ended.request.audio_length_in_s)

    def _request_metric(self, reason: str) -> Any:
        return self._requests_family.Metric(labels={**self._labels, "outcome": OUTCOMES[reason], "reason": reason})


def _values(load: Load) -> dict[str, float]:
    return {"tokens": load.tokens, "rows": load.rows, "seconds": load.audio_s}
