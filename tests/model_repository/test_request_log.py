"""The line of a request that is over: what stands in it, and that nobody can write another one with an id."""

import json
import re

import pytest
from generation_request import GenerationRequest
from job_entry import REASONS
from live_requests import EndedRequest
from request_log import OUTCOMES, SHOWN_ID_CHARACTERS, line_of, read_format

SECONDS = {"text": 0.0123, "queue": 0.0, "denoise": 1.5, "decode": 0.25, "total": 1.7623}
REQUEST = GenerationRequest(
    ("a secret prompt",) * 2, 10.24, ("a secret negative prompt",) * 2, num_waveforms_per_prompt=3
)
ENDED = EndedRequest("8c1f6a52", 0xAB, "ok", SECONDS, REQUEST, requests_ahead=4)


def test_the_line_tells_who_how_where_the_time_went_and_what_was_asked_for():
    assert line_of(ENDED, "audioldm2", "text") == (
        "request id=8c1f6a52 ticket=00000000000000ab model=audioldm2 outcome=finished reason=ok text_s=0.012 "
        "queue_s=0.0 denoise_s=1.5 decode_s=0.25 total_s=1.762 steps=20 length_s=10.24 prompts=2 candidates=3 ahead=4"
    )


def test_in_json_it_tells_the_same():
    fields = json.loads(line_of(ENDED, "audioldm2", "json"))
    assert fields.pop("event") == "request"
    text = line_of(ENDED, "audioldm2", "text").split(" ")[1:]
    assert [f"{name}={value}" for name, value in fields.items()] == text


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_text_of_the_request_is_in_it(log_format):
    assert "secret" not in line_of(ENDED, "audioldm2", log_format)


def test_a_request_without_an_id_has_its_ticket_and_one_that_could_not_be_read_no_more():
    ended = EndedRequest("", 0xAB, "INVALID_ARG", {"text": 0.0, "total": 0.0})
    assert line_of(ended, "audioldm2", "text") == (
        "request ticket=00000000000000ab model=audioldm2 outcome=refused reason=INVALID_ARG text_s=0.0 total_s=0.0 "
        "ahead=0"
    )


@pytest.mark.parametrize(
    "request_id",
    [
        "a b",
        'a" outcome="finished',
        "a\nrequest id=b",
        "a\r\n",
        "\u2028",
        "a=b",
        "\\",
        "é",
        "\x1b[31m",
        "\0",
        "🐕" * 32,
        "a" * 100_000,
        "' '",
    ],
)
def test_an_id_stays_one_value_of_one_line(request_id):
    ended = EndedRequest(request_id, 1, "ok", SECONDS, REQUEST)
    line = line_of(ended, "audioldm2", "text")
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 12 * SHOWN_ID_CHARACTERS
    shown = request_id[:SHOWN_ID_CHARACTERS]
    [value] = re.findall(r'^request id=("(?:[^"\\]|\\.)*"|[^"\s]+) ticket=\w+ model=audioldm2 outcome=finished ', line)
    assert (json.loads(value) if value.startswith('"') else value) == shown
    text = line_of(ended, "audioldm2", "json")
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text)["id"] == shown


def test_every_reason_has_an_outcome():
    assert set(OUTCOMES) == set(REASONS) - {""}


def test_the_format_is_text_unless_asked_for_and_another_one_is_refused():
    assert (read_format(""), read_format("text"), read_format("json")) == ("text", "text", "json")
    with pytest.raises(ValueError, match="AUDIOLDM2_LOG_FORMAT must be one of text, json, got 'xml'"):
        read_format("xml")
