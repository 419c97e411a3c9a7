"""What a status and a message mean. The statuses and texts are those that Triton 2.51 and gRPC 1.85 sent."""

import pickle

import audioldm2_client
import pytest
from audioldm2_client import (
    AccessDeniedError,
    AudioLDM2Error,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    ServerBusyError,
    ServerFaultError,
    ServerUnreachableError,
)
from audioldm2_client._errors import error_from_status
from audioldm2_client._request import GenerationOptions, build_request
from audioldm2_client._url import parse_url

REQUEST = build_request("x", GenerationOptions(), model_name="audioldm2", request_id="r1", timeout_s=2)
ADDRESS = parse_url("localhost:8001")


def explain(status: str | None, message: str | None) -> AudioLDM2Error:
    return error_from_status(status, message, REQUEST, ADDRESS)


@pytest.mark.parametrize(
    ("status", "message", "error_class"),
    [
        ("StatusCode.INVALID_ARGUMENT", "[INVALID_ARG] seed must be >= 0; got -1", InvalidRequestError),
        ("400", "[INVALID_ARG] seed must be >= 0; got -1", InvalidRequestError),
        ("400", "unexpected inference input 'x' for model 'y'", InvalidRequestError),
        ("StatusCode.UNAVAILABLE", "Exceeds maximum queue size", ServerBusyError),
        ("503", "Exceeds maximum queue size", ServerBusyError),
        ("StatusCode.CANCELLED", "stopped", RequestCancelledError),
        ("400", "[CANCELLED] stopped", RequestCancelledError),
        ("499", "stopped", RequestCancelledError),
        ("StatusCode.CANCELLED", "[DEADLINE] over", DeadlineExceededError),
        ("400", "[DEADLINE] over", DeadlineExceededError),
        ("400", "[INVALID_ARG] prompt must not be '[DEADLINE]'", InvalidRequestError),
        ("StatusCode.DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceededError),
        ("StatusCode.NOT_FOUND", "Request for unknown model: 'a' is not found", ModelNotFoundError),
        ("404", "Request for unknown model: 'a' has no available versions", ModelNotFoundError),
        ("404", "no such page", ServerFaultError),
        ("StatusCode.INTERNAL", "boom", ServerFaultError),
        ("500", "boom", ServerFaultError),
        ("StatusCode.RESOURCE_EXHAUSTED", "Received message larger than max (9 vs. 4)", InvalidRequestError),
        ("StatusCode.RESOURCE_EXHAUSTED", "rate limit of this key is used up", ServerBusyError),
        ("StatusCode.UNIMPLEMENTED", "in ensemble 'audioldm2', not supported here", ServerFaultError),
        ("StatusCode.UNIMPLEMENTED", "unknown service inference.GRPCInferenceService", ServerUnreachableError),
        ("StatusCode.UNIMPLEMENTED", "Received http2 header with status: 404", ServerUnreachableError),
        ("StatusCode.UNAVAILABLE", "Received http2 header with status: 429", ServerBusyError),
        ("StatusCode.UNAVAILABLE", "Received http2 header with status: 503", ServerBusyError),
        ("StatusCode.UNAVAILABLE", "Received http2 header with status: 504", ServerUnreachableError),
        ("StatusCode.UNAUTHENTICATED", "Received http2 header with status: 401", AccessDeniedError),
        ("StatusCode.UNKNOWN", "Received http2 header with status: 413", InvalidRequestError),
        ("StatusCode.UNAVAILABLE", "GOAWAY received", ServerUnreachableError),
        ("StatusCode.UNAVAILABLE", "ping timeout", ServerUnreachableError),
        (None, None, ServerFaultError),
    ],
)
def test_status_and_tag_decide_the_class(status, message, error_class):
    assert type(explain(status, message)) is error_class


@pytest.mark.parametrize(
    "message",
    [
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused",
        "errors resolving nosuch.invalid:8001: [field:hostname lookup error]",
        "DNS resolution failed for nosuch.invalid:8001",
        "Socket closed",
        "recvmsg:Connection reset by peer",
    ],
)
def test_unavailable_in_grpcs_own_words_means_unreachable(message):
    assert type(explain("StatusCode.UNAVAILABLE", message)) is ServerUnreachableError


@pytest.mark.parametrize(
    "prefix",
    [
        "in ensemble 'audioldm2', ",
        "[request id: r1] ",
        "[request id: r1] in ensemble 'a', in ensemble 'b', ",
        "in ensemble 'a', [request id: <id_unknown>] ",
    ],
)
def test_tritons_prefix_is_stripped_and_kept_in_the_raw_message(prefix):
    words = "[INVALID_ARG] num_inference_steps must be in 1..1000; got 0"
    error = explain("400", prefix + words)
    assert str(error) == words
    assert error.server_message == prefix + words
    assert error.request_id == "r1"


def test_prefix_within_the_sentence_stays():
    words = "[INVALID_ARG] prompt must not be \"in ensemble 'x', \""
    assert str(explain("400", words)) == words


def test_fault_names_the_request_id():
    assert str(explain("500", "in ensemble 'audioldm2', boom")) == "the server failed on request r1: boom"


def test_message_without_words_says_so():
    assert str(explain("503", "")) == "the server gave no reason"


def test_every_error_is_public_picklable_and_one_family():
    classes = {explain(s, "x") for s in ("400", "503", "499", "500", "StatusCode.DEADLINE_EXCEEDED")}
    for error in classes:
        assert isinstance(error, AudioLDM2Error)
        assert type(error).__name__ in audioldm2_client.__all__
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - made on the line itself
        assert (type(copy), str(copy), copy.request_id) == (type(error), str(error), "r1")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("localhost:8001", "grpc://localhost:8001"),
        ("grpc://10.0.0.1:9001/", "grpc://10.0.0.1:9001"),
        ("[::1]:8001", "grpc://[::1]:8001"),
        ("http://host:8000", "http://host:8000"),
        ("http://host:8000/triton/", "http://host:8000/triton"),
        ("grpcs://host:443", "grpcs://host:443"),
        ("https://host:443/triton", "https://host:443/triton"),
    ],
)
def test_url_is_understood(url, text):
    assert str(parse_url(url)) == text


@pytest.mark.parametrize(
    ("url", "better"),
    [
        ("http://host:8000/v2", "http://host:8000;"),
        ("http://host:8000/v2/", "http://host:8000;"),
        ("http://host:8000/triton/v2/models/audioldm2/infer", "http://host:8000/triton;"),
        ("https://host:443/v2/health/ready", "https://host:443;"),
    ],
)
def test_url_with_tritons_own_path_is_refused_with_the_right_one(url, better):
    with pytest.raises(ValueError, match=r"url must end before /v2") as caught:
        parse_url(url)
    assert f": {better}" in str(caught.value)


@pytest.mark.parametrize("url", ["http://host:8000/v2-gateway", "http://host:8000/v2/audio", "http://host:8000/v20"])
def test_url_whose_base_path_only_resembles_tritons_is_understood(url):
    assert str(parse_url(url)) == url


@pytest.mark.parametrize("url", ["", "localhost", "ftp://a:1", "http://a", ":8001", "a:b", "a:99999", "a:1/x", "u@a:1"])
def test_bad_url_is_a_value_error_that_shows_it(url):
    with pytest.raises(ValueError, match=r"url (must|has)") as caught:
        parse_url(url)
    assert repr(url) in str(caught.value)
