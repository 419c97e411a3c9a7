"""TLS and headers against real servers: Triton's own TLS for gRPC, a TLS proxy before it for HTTP, restricted APIs."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from audioldm2_client import (
    AccessDeniedError,
    AsyncAudioLDM2Client,
    AudioLDM2Client,
    AudioLDM2Error,
    ServerUnreachableError,
    TlsOptions,
)
from audioldm2_client._cli.main import main
from audioldm2_client._connection import check_headers
from audioldm2_client._url import parse_url, parse_urls

from server import EmbeddedServer
from tests.helpers.tls_server import GRPC_HEADER, HTTP_HEADER, KEY, TlsProxy


@pytest.fixture
def guarded_url(protocol: str, guarded_server: EmbeddedServer, tls_proxy: TlsProxy) -> str:
    if protocol == "grpc":
        return f"grpcs://localhost:{guarded_server.grpc_url.rpartition(':')[2]}"
    return f"https://localhost:{tls_proxy.port}"


@pytest.fixture
def tls(certificates: Path) -> TlsOptions:
    return TlsOptions(certificates / "ca.pem", certificates / "client.pem", certificates / "client.key")


@pytest.fixture
def headers(protocol: str) -> dict[str, str]:
    return {GRPC_HEADER if protocol == "grpc" else HTTP_HEADER: KEY}


def test_certificates_and_header_open_the_server(guarded_url, tls, headers):
    with AudioLDM2Client(guarded_url, tls=tls, headers=headers) as client:
        client.wait_until_ready(20)
        assert client.generate("a dog", seed=7).seed == 7


def test_certificates_and_header_open_the_server_for_asyncio(guarded_url, tls, headers):
    async def generate() -> int:
        async with AsyncAudioLDM2Client(guarded_url, tls=tls, headers=headers) as client:
            await client.wait_until_ready(20)
            return (await client.generate("a dog", seed=7)).seed

    assert asyncio.run(generate()) == 7


@pytest.mark.parametrize("wrong", [{}, {GRPC_HEADER: "other", HTTP_HEADER: "other"}])
def test_missing_or_wrong_key_is_access_denied_at_once(guarded_url, tls, wrong):
    with (
        AudioLDM2Client(guarded_url, tls=tls, headers=wrong, max_retries=1000) as client,
        pytest.raises(AccessDeniedError, match=r"denies access.*check the API key") as caught,
    ):
        client.generate("a dog")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("files", [("ca",), ()])
def test_server_of_an_unknown_authority_or_without_our_certificate_is_unreachable(guarded_url, certificates, files):
    tls = TlsOptions(*(certificates / f"{name}.pem" for name in files))  # the client's own certificate is missing
    client = AudioLDM2Client(guarded_url, tls=tls, max_retries=0, timeout_s=20)
    with client, pytest.raises(ServerUnreachableError):
        client.generate("a dog")


def test_another_authority_is_not_tried_again(guarded_url, certificates):
    other = TlsOptions(certificates / "client.pem", certificates / "client.pem", certificates / "client.key")
    client = AudioLDM2Client(guarded_url, tls=other, max_retries=1000, timeout_s=60)
    with client, pytest.raises(ServerUnreachableError) as caught:
        client.generate("a dog")
    assert not caught.value.safe_to_retry


def test_command_line_takes_files_headers_and_the_key(guarded_url, certificates, headers, tmp_path, capsys):
    (name,) = headers
    output = tmp_path / "dog.wav"
    options = [
        f"--url={guarded_url}",
        f"--ca-file={certificates / 'ca.pem'}",
        f"--cert-file={certificates / 'client.pem'}",
        f"--key-file={certificates / 'client.key'}",
    ]
    assert main(["a dog", "-o", str(output), *options]) == 5
    assert main(["a dog", "-o", str(output), *options, "--header", f"{name}: {KEY}"]) == 0
    assert output.exists()
    captured = capsys.readouterr()
    assert KEY not in captured.out + captured.err


@pytest.mark.parametrize(
    ("name", "value"),
    [("bad name", "x"), ("", "x"), ("host", "x"), ("Content-Length", "1"), ("grpc-timeout", "1"), ("key-bin", "x")],
)
def test_header_name_that_cannot_be_used_is_refused(name, value):
    with pytest.raises(ValueError, match="headers must not hold"):
        check_headers({name: value})


@pytest.mark.parametrize("value", ["s3cret\r\nx: y", "s3crét", " s3cret", ""])
def test_header_value_that_cannot_be_sent_is_refused_without_showing_it(value):
    with pytest.raises(ValueError, match="value of header 'x-key'") as caught:
        check_headers({"x-key": value})
    assert "3cr" not in str(caught.value)


def test_tls_options_never_fall_back_to_plain_text(tls):
    assert str(parse_url("localhost:1", with_tls_options=True)) == "grpcs://localhost:1"
    for url in ("grpc://localhost:1", "http://localhost:1"):
        with pytest.raises(ValueError, match="where TLS options are given"):
            AudioLDM2Client(url, tls=tls)


def test_tls_files_are_checked_when_the_client_is_made(certificates, tmp_path):
    empty = tmp_path / "empty.pem"
    empty.touch()
    with pytest.raises(ValueError, match="cert_file and key_file must be given together"):
        AudioLDM2Client(tls=TlsOptions(cert_file=certificates / "client.pem"))
    with pytest.raises(ValueError, match="ca_file must hold certificates"):
        AudioLDM2Client(tls=TlsOptions(empty))
    with pytest.raises(ValueError, match="must hold a certificate and its unencrypted key"):
        AudioLDM2Client(tls=TlsOptions(cert_file=empty, key_file=empty))
    with pytest.raises(FileNotFoundError):
        AudioLDM2Client(tls=TlsOptions(tmp_path / "nosuch.pem"))


@pytest.mark.parametrize(
    ("urls", "sentence"),
    [
        ([], "at least one server"),
        (["a:1", "a:1"], "every server once"),
        (["a:1", "http://a:2"], "one protocol"),
    ],
)
def test_bad_list_of_servers_is_refused(urls, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_urls(urls)


def test_password_in_a_url_is_not_shown():
    with pytest.raises(ValueError, match="no more than a host and a port") as caught:
        parse_url("http://user:s3cret@host:8000")
    assert "s3cret" not in str(caught.value)


@pytest.fixture
def redirecting() -> Iterator[tuple[int, list[bytes]]]:
    """A server that sends everybody somewhere else; its port, and what arrives there."""
    arrived: list[bytes] = []
    elsewhere = socket.create_server(("127.0.0.1", 0))
    redirecting = socket.create_server(("127.0.0.1", 0))
    answers = {
        redirecting: f"307 Temporary Redirect\r\nLocation: http://127.0.0.1:{elsewhere.getsockname()[1]}/x",
        elsewhere: "500 No",
    }

    def serve(listening: socket.socket) -> None:
        while True:
            try:
                connection = listening.accept()[0]
            except OSError:
                return  # closed below
            with connection:
                request = connection.recv(65536)
                if listening is elsewhere:
                    arrived.append(request)
                connection.sendall(f"HTTP/1.1 {answers[listening]}\r\nContent-Length: 0\r\n\r\n".encode())

    threads = [threading.Thread(target=serve, args=(listening,)) for listening in answers]
    for thread in threads:
        thread.start()
    yield redirecting.getsockname()[1], arrived
    for listening in answers:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
    for thread in threads:
        thread.join()


def test_redirect_does_not_carry_the_headers_elsewhere(redirecting):
    port, arrived = redirecting
    settings = {"headers": {"x-api-key": KEY}, "max_retries": 0, "timeout_s": 20}

    async def with_asyncio() -> None:
        async with AsyncAudioLDM2Client(f"http://127.0.0.1:{port}", **settings) as client:
            await client.generate("a dog")

    with AudioLDM2Client(f"http://127.0.0.1:{port}", **settings) as client, pytest.raises(AudioLDM2Error):
        client.generate("a dog")
    with pytest.raises(AudioLDM2Error):
        asyncio.run(with_asyncio())
    assert arrived == []
