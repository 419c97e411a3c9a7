"""What may be asked of the model `jobs`, and the sentence for what may not."""

import numpy as np
import pytest
from job_query import InvalidQueryError, JobQuery, parse_query


def ask(**inputs: bytes | str) -> JobQuery:
    return parse_query({name: np.array([value], np.object_) for name, value in inputs.items()})


@pytest.mark.parametrize("request_id", [b"a", b"a" * 128, "é".encode() * 64, b"../../etc/passwd", b" ", b"a\0b"])
def test_any_short_text_is_an_id(request_id):
    assert ask(request_id=request_id) == JobQuery(request_id, "status")


def test_the_action_is_status_or_cancel():
    assert ask(request_id="a", action=b"status").action == "status"
    assert ask(request_id="a", action="cancel").action == "cancel"


def test_a_parameter_tells_that_triton_has_ended_the_request():
    inputs = {name: np.array([value], np.object_) for name, value in (("request_id", "a"), ("action", "cancel"))}
    assert parse_query(inputs, '{"dropped_by_triton": true}').is_dropped
    assert not parse_query(inputs, '{"dropped_by_triton": "no", "timeout": 3}').is_dropped
    assert not parse_query(inputs, "{}").is_dropped


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"request_id": b""}, "request_id is out of bounds: it must have between 1 and 128 bytes, got 0."),
        ({"request_id": b"a" * 129}, "request_id is out of bounds: it must have between 1 and 128 bytes, got 129."),
        ({"request_id": "é" * 65}, "request_id is out of bounds: it must have between 1 and 128 bytes, got 130."),
        ({"request_id": b"a\xff"}, "request_id must be UTF-8, and byte 1 of it isn't."),
        ({"request_id": b"a", "action": b""}, "action must be one of status, cancel, got ''."),
        ({"request_id": b"a", "action": b"Cancel"}, "action must be one of status, cancel, got 'Cancel'."),
        ({"request_id": b"a", "action": b"\xff"}, "action must be one of status, cancel, got '\ufffd'."),
        ({"request_id": b"a", "action": b"a" * 999}, f"action must be one of status, cancel, got '{'a' * 40}'."),
    ],
)
def test_what_is_wrong_is_named(inputs, sentence):
    with pytest.raises(InvalidQueryError) as caught:
        ask(**inputs)
    assert str(caught.value) == f"[INVALID_ARG] {sentence}"
