"""Answers that aren't Triton's: gateways, proxies, other servers and what happens to bodies on their way."""

import asyncio
import datetime
import email.utils
import gzip
import json
import time
from collections.abc import Callable

import httpx
import pytest
from audioldm2_client import (
    AccessDeniedError,
    AsyncAudioLDM2Client,
    AudioLDM2Client,
    AudioLDM2Error,
    InvalidRequestError,
    ModelNotFoundError,
    ServerBusyError,
    ServerFaultError,
    ServerUnreachableError,
)
from audioldm2_client._cli.main import main
from audioldm2_client._gateway import retry_after_s
from audioldm2_client._kserve import HEADER_LENGTH

from server import EmbeddedServer
from tests.helpers.gateways import Answering

PAGE = b"<html><head><title>oh</title><style>x{}</style></head><body>a page of the proxy</body></html>"


def answer(status: str, body: bytes = PAGE, *fields: str, length: int | None = None) -> bytes:
    head = (f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *fields)
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def generate_blocking(url: str, **settings) -> AudioLDM2Error:
    with AudioLDM2Client(url, **settings) as client, pytest.raises(AudioLDM2Error) as caught:
        client.generate("a dog")
    return caught.value


def generate_asyncio(url: str, **settings) -> AudioLDM2Error:
    async def generate() -> None:
        async with AsyncAudioLDM2Client(url, **settings) as client:
            await client.generate("a dog")

    with pytest.raises(AudioLDM2Error) as caught:
        asyncio.run(generate())
    return caught.value


@pytest.fixture(params=[generate_blocking, generate_asyncio])
def fail(request) -> Callable[..., AudioLDM2Error]:
    """Generates, and returns the error that comes out, which must be one of the package's own."""

    def generate(answer: bytes, **settings) -> AudioLDM2Error:
        with Answering(answer) as server:
            settings = {"max_retries": 0, "timeout_s": 20, **settings}
            return request.param(f"http://127.0.0.1:{server.port}/base", **settings)

    return generate


@pytest.mark.parametrize(
    ("status", "error_class", "safe", "misconfigured"),
    [
        ("502 Bad Gateway", ServerUnreachableError, True, False),
        ("503 Service Unavailable", ServerBusyError, True, False),
        ("504 Gateway Timeout", ServerUnreachableError, True, False),
        ("522 ", ServerUnreachableError, True, False),
        ("429 Too Many Requests", ServerBusyError, True, False),
        ("413 Request Entity Too Large", InvalidRequestError, False, False),
        ("401 Unauthorized", AccessDeniedError, False, False),
        ("403 Forbidden", AccessDeniedError, False, False),
        ("407 Proxy Authentication Required", AccessDeniedError, False, False),
        ("301 Moved Permanently", ServerUnreachableError, False, True),
        ("404 Not Found", ServerUnreachableError, False, True),
        ("405 Method Not Allowed", ServerUnreachableError, False, True),
        ("200 OK", ServerUnreachableError, False, True),
        ("202 Accepted", ServerUnreachableError, False, True),
        ("500 Internal Server Error", ServerFaultError, False, False),
        ("418 I'm a Teapot", ServerFaultError, False, False),
        ("599 ", ServerFaultError, False, False),
    ],
)
@pytest.mark.parametrize("body", [PAGE, b"", b'{"message": "a page of the proxy"}'])
def test_status_of_a_gateway_is_named_and_has_its_class(fail, status, error_class, safe, misconfigured, body):
    error = fail(answer(status, body))
    assert (type(error), error.safe_to_retry, error.misconfigured) == (error_class, safe, misconfigured)
    assert f"answered {status[:3]}" in str(error)
    assert ("a page of the proxy" in str(error)) == (body != b"")
    assert "<" not in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("status", ["413", "429", "502", "504"])
def test_status_that_triton_does_not_use_counts_whatever_form_its_words_have(fail, status):
    assert f"answered {status}" in str(fail(answer(f"{status} x", b'{"error": "[INVALID_ARG] no"}')))


def test_body_that_is_too_large_says_so(fail):
    assert "body is too large" in str(fail(answer("413 Payload Too Large")))


def test_redirect_names_where_it_leads(fail):
    error = fail(answer("307 Temporary Redirect", b"", "Location: https://other.example/x"))
    assert "redirects aren't followed" in str(error)
    assert "https://other.example/x" in str(error)


@pytest.mark.parametrize(
    "raw",
    [
        answer("200 OK", b""),
        answer("200 OK", b"{}"),
        answer("200 OK", b'{"outputs": []}', "Inference-Header-Content-Length: 3"),
        answer("200 OK", PAGE, "Content-Type: text/html"),
        answer("200 OK", PAGE, length=10_000),
        answer("200 OK", PAGE, length=3),
        answer("200 OK", PAGE, "Content-Encoding: gzip"),
        answer("200 OK", gzip.compress(PAGE, mtime=0), "Content-Encoding: gzip"),
        answer("200 OK", gzip.compress(PAGE, mtime=0)[:20], "Content-Encoding: gzip", length=20),
        answer("200 OK", b"\x00\xff" * 1000, "Content-Type: application/octet-stream"),
        answer("502 Bad Gateway", PAGE, length=10_000),
        answer("502 Bad Gateway", PAGE, "Content-Encoding: gzip"),
        answer("502 Bad Gateway", PAGE * 10_000),
        answer("200 OK", PAGE, "Transfer-Encoding: chunked"),
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbroken\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + PAGE,
        b"HTTP/1.1 999 No\r\nContent-Length: 0\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46",
        b"",
    ],
)
def test_whatever_is_answered_ends_as_an_error_of_the_package(fail, raw):
    error = fail(raw)
    assert isinstance(error, (ServerUnreachableError, ServerFaultError))
    assert "\n" not in str(error)


def test_page_that_is_cut_off_still_has_its_status(fail):
    for raw in (
        answer("502 Bad Gateway", PAGE, length=9999),
        answer("502 Bad Gateway", PAGE, "Content-Encoding: gzip"),
    ):
        assert "answered 502 Bad Gateway" in str(fail(raw))


def pass_on(request: bytes, server: EmbeddedServer) -> httpx.Response:
    """Send what arrived at a gateway to Triton."""
    head, _, body = request.partition(b"\r\n\r\n")
    line, *fields = head.decode().split("\r\n")
    headers = dict(field.split(": ", 1) for field in fields)
    return httpx.post(
        f"http://{server.http_url}{line.split()[1]}", content=body, headers=headers, trust_env=False, timeout=20
    )


def of_triton(response: httpx.Response) -> tuple[str, ...]:
    """The header fields that a gateway must keep."""
    return tuple(f"{name}: {response.headers[name]}" for name in (HEADER_LENGTH,) if name in response.headers)


def test_good_answer_that_is_compressed_on_its_way_is_read(toy_server):
    def compress(request: bytes) -> bytes:
        found = pass_on(request, toy_server)
        return answer("200 OK", gzip.compress(found.content, mtime=0), *of_triton(found), "Content-Encoding: gzip")

    with Answering(compress) as server, AudioLDM2Client(f"http://127.0.0.1:{server.port}") as client:
        assert client.generate("a dog", seed=7).seed == 7


def test_retry_after_is_kept_and_the_next_answer_counts():
    answers = [
        answer("503 Service Unavailable", PAGE, "Retry-After: 1"),
        answer("404 Not Found", b'{"error":"Request for unknown model: x"}'),
    ]
    with Answering(lambda _: answers.pop(0)) as server:
        start = time.monotonic()
        with (
            AudioLDM2Client(f"http://127.0.0.1:{server.port}", max_retries=1) as client,
            pytest.raises(ModelNotFoundError),
        ):
            client.generate("a dog")
    assert 1 <= time.monotonic() - start < 6


def test_retry_after_beyond_the_timeout_is_not_waited_for(fail):
    error = fail(answer("429 Too Many Requests", PAGE, "Retry-After: 3600"), max_retries=5)
    assert error.retry_after_s == 3600


def test_retry_after_is_seconds_or_a_date():
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100)
    assert 90 < retry_after_s({"retry-after": email.utils.format_datetime(soon, usegmt=True)}) <= 100
    assert retry_after_s({"retry-after": " 7 "}) == 7
    assert retry_after_s({"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}) == 0
    for odd in ("", "-1", "soon", "1.5", "²", "Mon, 99 Foo 2001", "9" * 400):
        assert retry_after_s({"retry-after": odd}) in (None, float("inf"))


def test_batch_waits_for_a_gateway_and_goes_on(tmp_path, toy_server, capsys):
    refusals = ["502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout", "429 Too Many Requests"]

    def refuse_at_first(request: bytes) -> bytes:
        if refusals and b"/models/audioldm2/" in request:
            return answer(refusals.pop(0), PAGE, "Retry-After: 0")
        found = pass_on(request, toy_server)
        return answer(f"{found.status_code} of Triton", found.content, *of_triton(found))

    (tmp_path / "p.txt").write_text("a dog\n")
    with Answering(refuse_at_first) as server:
        arguments = ["--prompts", str(tmp_path / "p.txt"), "--output-dir", str(tmp_path / "out"), "--retry-for", "60"]
        assert main([*arguments, "--url", f"http://127.0.0.1:{server.port}", "--json"]) == 0
    assert refusals == []
    assert json.loads(capsys.readouterr().out)["prompt"] == "a dog"


def test_page_is_no_readiness():
    with Answering(answer("200 OK")) as server, AudioLDM2Client(f"http://127.0.0.1:{server.port}") as client:
        assert client.is_ready() is False
