"""TLS and headers against real servers: Triton's own TLS for gRPC, a TLS proxy before it for HTTP, restricted APIs."""

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from audioldm2_client import (
    AccessDeniedError,
    AsyncAudioLDM2Client,
    AudioLDM2Client,
    ServerUnreachableError,
    TlsOptions,
)
from audioldm2_client._cli import main
from audioldm2_client._connection import check_headers
from audioldm2_client._url import parse_url, parse_urls

from server import EmbeddedServer

KEY = "s3cret-key"
GRPC_HEADER = "triton-grpc-protocol-key"
HTTP_HEADER = "x-api-key"


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)  # noqa: S607


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates of it for localhost (server.*) and for a client (client.*)."""
    if shutil.which("openssl") is None:
        pytest.fail("these tests need the command openssl")
    folder = tmp_path_factory.mktemp("tls")
    new_key = ("-newkey", "rsa:2048", "-nodes", "-days", 2)
    openssl("req", "-x509", *new_key, "-subj", "/CN=test", "-keyout", folder / "ca.key", "-out", folder / "ca.pem")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        key, request, certificate = (folder / f"{name}.{ending}" for ending in ("key", "csr", "pem"))
        openssl("req", *new_key, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        authority = ("-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-CAcreateserial")
        openssl(
            "x509", "-req", "-in", request, *authority, "-days", 2, "-extfile", folder / "names", "-out", certificate
        )
    return folder


@pytest.fixture(scope="session")
def guarded_server(toy_repository_without_jobs: Path, certificates: Path) -> Iterator[EmbeddedServer]:
    """Mutual TLS over gRPC, and a header without which neither protocol allows inference."""
    arguments = (
        "--grpc-use-ssl=1",
        "--grpc-use-ssl-mutual=1",
        f"--grpc-server-cert={certificates / 'server.pem'}",
        f"--grpc-server-key={certificates / 'server.key'}",
        f"--grpc-root-cert={certificates / 'ca.pem'}",
        f"--grpc-restricted-protocol=inference:key={KEY}",
        f"--http-restricted-api=inference:{HTTP_HEADER}={KEY}",
    )
    with EmbeddedServer(toy_repository_without_jobs, extra_arguments=arguments) as server:
        yield server


class TlsProxy:
    """Ends TLS on a port of its own and passes the bytes on."""

    def __init__(self, target: str, certificates: Path) -> None:
        host, port = target.split(":")
        self._target = (host, int(port))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
        self._context.load_verify_locations(certificates / "ca.pem")
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                plain = self._listening.accept()[0]
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(plain,)))
            self._threads[-1].start()

    def _serve(self, plain: socket.socket) -> None:
        plain.settimeout(20)
        try:
            with self._context.wrap_socket(plain, server_side=True) as client:
                with socket.create_connection(self._target, 20) as server:
                    back = threading.Thread(target=self._copy, args=(server, client))
                    back.start()
                    self._copy(client, server)
                    server.shutdown(socket.SHUT_RDWR)
                    back.join()
        except OSError:
            plain.close()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while block := source.recv(65536):
                target.sendall(block)
        except OSError:
            return

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="session")
def tls_proxy(guarded_server: EmbeddedServer, certificates: Path) -> Iterator[TlsProxy]:
    proxy = TlsProxy(guarded_server.http_url, certificates)
    yield proxy
    proxy.close()


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
    with AudioLDM2Client(guarded_url, tls=tls, headers=wrong, max_retries=1000) as client:
        with pytest.raises(AccessDeniedError, match="denies access.*check the API key") as caught:
            client.generate("a dog")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("files", [("ca",), ()])
def test_server_of_an_unknown_authority_or_without_our_certificate_is_unreachable(guarded_url, certificates, files):
    tls = TlsOptions(*(certificates / f"{name}.pem" for name in files))  # the client's own certificate is missing
    with AudioLDM2Client(guarded_url, tls=tls, max_retries=0, timeout_s=20) as client:
        with pytest.raises(ServerUnreachableError):
            client.generate("a dog")


def test_another_authority_is_not_tried_again(guarded_url, certificates):
    other = TlsOptions(certificates / "client.pem", certificates / "client.pem", certificates / "client.key")
    with AudioLDM2Client(guarded_url, tls=other, max_retries=1000, timeout_s=60) as client:
        with pytest.raises(ServerUnreachableError) as caught:
            client.generate("a dog")
    assert not caught.value.safe_to_retry


def test_command_line_takes_files_headers_and_the_key(guarded_url, certificates, protocol, headers, tmp_path, capsys):
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
