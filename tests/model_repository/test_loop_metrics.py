"""What the loop counts, once each, and what of it Triton gets."""

import gc
from collections import Counter

import pytest
from denoising_errors import DeadlineError, ForwardError, NonFiniteError, RequestCancelledError, SchedulerStepsError
from loop_metrics import ROWS_BUCKETS, SECONDS_BUCKETS, Counts, LoopMetrics, PublishedMetrics

from tests.helpers.recorded_metrics import FAMILIES, RecordedFamily, RecordedMetric

LABELS = {"model": "unet", "version": "1"}


@pytest.fixture
def metrics() -> LoopMetrics:
    return LoopMetrics()


@pytest.fixture
def published(metrics) -> PublishedMetrics:
    FAMILIES.clear()
    return PublishedMetrics(metrics, RecordedFamily, LABELS)


def values(name: str) -> list[float]:
    (metric,) = FAMILIES[f"audioldm2_unet_{name}"].metrics
    return metric.values


def requests() -> dict[tuple[str, str], list[int]]:
    metrics = FAMILIES["audioldm2_unet_requests_total"].metrics
    return {(metric.labels["outcome"], metric.labels["reason"]): metric.values for metric in metrics}


def test_taking_the_counts_empties_them(metrics):
    assert metrics.take() == Counts()
    metrics.count_forward(rows=6, seconds=0.5, steps=2)
    metrics.count_forward(rows=1, seconds=0.25, steps=1)
    metrics.count_shortage()
    metrics.count_request(None)
    expected = Counts(3, [6, 1], [0.5, 0.25], 1, Counter({("finished", "ok"): 1}))
    assert metrics.take() == expected
    assert metrics.take() == Counts()
    metrics.count_request(None)
    assert expected == Counts(3, [6, 1], [0.5, 0.25], 1, Counter({("finished", "ok"): 1}))


def test_what_happened_is_published_once(metrics, published):
    metrics.count_forward(rows=6, seconds=0.5, steps=2)
    metrics.count_forward(rows=1, seconds=0.25, steps=1)
    metrics.count_shortage()
    metrics.count_request(None)
    for _ in range(3):
        published.publish(in_flight=2, waiting=1)
    assert values("memory_shortages_total") == [1]
    assert values("steps_total") == [3]
    assert values("rows_per_forward") == [6, 1]
    assert values("seconds_per_forward") == [0.5, 0.25]
    assert requests() == {("finished", "ok"): [1]}
    metrics.count_forward(rows=8, seconds=1.5, steps=4)
    published.publish(in_flight=2, waiting=1)
    assert values("steps_total") == [3, 4]
    assert values("rows_per_forward") == [6, 1, 8]
    assert values("seconds_per_forward") == [0.5, 0.25, 1.5]


def test_how_the_unet_runs_is_in_the_labels_of_a_gauge(published):
    published.publish_choice({"dtype": "float16", "cuda_graphs": "on"})
    (metric,) = FAMILIES["audioldm2_unet_info"].metrics
    assert metric.values == [1]
    assert metric.labels == {**LABELS, "dtype": "float16", "cuda_graphs": "on"}


def test_gauges_tell_the_present(published):
    published.publish(in_flight=3, waiting=2)
    published.publish(in_flight=1, waiting=0)
    assert values("requests_in_flight") == [3, 1]
    assert values("requests_waiting") == [2, 0]


def test_requests_are_counted_by_outcome_and_reason(metrics, published):
    ends = [
        None,
        None,
        ForwardError(),
        NonFiniteError(),
        SchedulerStepsError(),
        DeadlineError(),
        RequestCancelledError(),
    ]
    for error in ends:
        metrics.count_request(error)
    published.publish(0, 0)
    metrics.count_request(None)
    published.publish(0, 0)
    # One metric for each, also after a second time.
    assert requests() == {
        ("finished", "ok"): [2, 1],
        ("failed", "ForwardError"): [1],
        ("failed", "NonFiniteError"): [1],
        ("failed", "SchedulerStepsError"): [1],
        ("deadline", "DeadlineError"): [1],
        ("cancelled", "RequestCancelledError"): [1],
    }
    assert len(FAMILIES["audioldm2_unet_requests_total"].metrics) == 6


def test_every_metric_carries_the_labels_and_histograms_their_buckets(metrics, published):
    metrics.count_request(None)
    published.publish(0, 0)
    made = [(metric, family.kind) for family in FAMILIES.values() for metric in family.metrics]
    assert len(made) == 7
    assert all(metric.labels.items() >= LABELS.items() for metric, _ in made)
    assert {metric.buckets and tuple(metric.buckets) for metric, kind in made if kind != "histogram"} == {None}
    assert [tuple(metric.buckets) for metric, kind in made if kind == "histogram"] == [ROWS_BUCKETS, SECONDS_BUCKETS]


def test_families_live_as_long_as_what_is_published(metrics):
    FAMILIES.clear()
    published = PublishedMetrics(metrics, RecordedFamily, LABELS)
    names = set(FAMILIES)
    gc.collect()
    assert len(names) == 7
    assert set(FAMILIES) == names
    metrics.count_request(None)
    published.publish(0, 0)
    del published
    gc.collect()
    assert not FAMILIES


def test_what_could_not_be_published_is_published_the_next_time(metrics, published, monkeypatch):
    metrics.count_forward(rows=6, seconds=0.5, steps=2)
    metrics.count_forward(rows=1, seconds=0.25, steps=1)
    metrics.count_request(None)
    with monkeypatch.context() as patch:
        patch.setattr(RecordedMetric, "observe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            published.publish(in_flight=0, waiting=0)
    published.publish(in_flight=0, waiting=0)
    assert values("steps_total") == [3]
    assert values("rows_per_forward") == [6, 1]
    assert values("seconds_per_forward") == [0.5, 0.25]
    assert requests() == {("finished", "ok"): [1]}
