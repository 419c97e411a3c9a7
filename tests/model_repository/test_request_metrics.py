"""What `/metrics` tells of whole requests."""

import gc
import json

import audioldm2_client
import pytest
from admission import Budgets, Load
from generation_request import GenerationRequest
from live_requests import EndedRequest
from request_metrics import SECONDS_BUCKETS, VERSION, RequestMetrics, build_labels

from tests.helpers.recorded_metrics import FAMILIES, RecordedFamily

SECONDS = {"text": 0.1, "queue": 0.2, "denoise": 1.5, "decode": 0.25, "total": 2.05}
REQUEST = GenerationRequest(("a",) * 2, 10.0, num_waveforms_per_prompt=3)
BUDGETS = Budgets(1000, 8, 60.0)


@pytest.fixture
def metrics() -> RequestMetrics:
    FAMILIES.clear()
    published = RequestMetrics(RecordedFamily, "music", BUDGETS, {"version": "1.2", "checkpoint": "c"})
    gc.collect()
    return published


def values(name: str, **labels: str) -> list[float]:
    return [
        value
        for metric in FAMILIES[f"audioldm2_{name}"].metrics
        if labels.items() <= metric.labels.items()
        for value in metric.values
    ]


def test_a_finished_request_is_counted_with_its_times_and_its_audio(metrics):
    metrics.publish([EndedRequest("a", 1, "ok", SECONDS, REQUEST)], Load())
    assert values("requests_total", model="music", outcome="finished", reason="ok") == [1]
    for stage, seconds in SECONDS.items():
        assert values("request_seconds", model="music", stage=stage) == [seconds]
    assert values("audio_seconds_total", model="music") == [60.0]


@pytest.mark.parametrize(
    ("reason", "outcome"), [("DEADLINE", "deadline"), ("CANCELLED", "cancelled"), ("INTERNAL", "failed")]
)
def test_a_request_that_ends_early_is_counted_with_the_times_that_it_has(metrics, reason, outcome):
    metrics.publish([EndedRequest("a", 1, reason, {"text": 0.1, "total": 0.1}, REQUEST)], Load())
    assert values("requests_total", outcome=outcome, reason=reason) == [1]
    assert values("request_seconds") == [0.1, 0.1]
    assert values("audio_seconds_total") == []


@pytest.mark.parametrize("reason", ["UNAVAILABLE", "INVALID_ARG"])
def test_a_refusal_is_counted_and_leaves_the_times_of_the_others_alone(metrics, reason):
    metrics.publish([EndedRequest("a", 1, reason, {"text": 0.0, "total": 0.0})], Load())
    assert values("requests_total", outcome="refused", reason=reason) == [1]
    assert values("request_seconds") == []


@pytest.mark.usefixtures("metrics")
def test_every_reason_is_there_from_the_start():
    reasons = {metric.labels["reason"] for metric in FAMILIES["audioldm2_requests_total"].metrics}
    assert reasons == {"ok", "INVALID_ARG", "UNAVAILABLE", "DEADLINE", "CANCELLED", "INTERNAL"}


def test_what_is_live_stands_beside_its_limits(metrics):
    for load in (Load(10, 2, 5.0), Load(10, 2, 5.0), Load()):
        metrics.publish([], load)
    assert values("admission_tokens", model="music") == [10, 0], "what hasn't changed isn't told again"
    assert values("admission_rows") == [2, 0]
    assert values("admission_seconds") == [5.0, 0.0]
    assert values("admission_tokens_limit", model="music") == [1000]
    assert values("admission_rows_limit") == [8]
    assert values("admission_seconds_limit") == [60.0]


@pytest.mark.usefixtures("metrics")
def test_the_build_is_told_once_and_stays():
    assert values("build_info", model="music", version="1.2", checkpoint="c") == [1]


def test_the_buckets_rise_and_hold_the_longest_requests():
    assert list(SECONDS_BUCKETS) == sorted(set(SECONDS_BUCKETS))
    assert SECONDS_BUCKETS[-1] >= 600


@pytest.mark.parametrize(
    ("checkpoint", "name"), [("cvssp/audioldm2", "cvssp/audioldm2"), ("/home/me/secret/checkpoint", "checkpoint")]
)
def test_the_build_names_the_checkpoint_and_not_where_it_lies(tmp_path, checkpoint, name):
    record = tmp_path / "checkpoint.json"
    record.write_text(json.dumps({"checkpoint": checkpoint, "exporter": "98f4"}))
    assert build_labels(record) == {"version": VERSION, "checkpoint": name, "exporter": "98f4"}


@pytest.mark.parametrize("content", [None, "", "{", '"a"', "[]"])
def test_without_a_record_the_build_has_a_version_alone(tmp_path, content):
    if content is not None:
        (tmp_path / "checkpoint.json").write_text(content)
    assert build_labels(tmp_path / "checkpoint.json") == {"version": VERSION, "checkpoint": "", "exporter": ""}


def test_the_version_is_that_of_the_client_which_is_released_with_it():
    assert audioldm2_client.__version__ == VERSION
