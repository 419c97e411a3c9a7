"""What TLS tests need: certificates, a proxy that ends TLS before Triton's HTTP, and a server that wants a key."""

import socket
import ssl
import subprocess
import threading
from pathlib import Path

KEY = "s3cret-key"
GRPC_HEADER = "triton-grpc-protocol-key"
HTTP_HEADER = "x-api-key"


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)  # noqa: S607


def make_certificates(folder: Path) -> None:
    """An authority, and certificates of it for localhost (server.*) and for a client (client.*)."""
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


def guarding_arguments(certificates: Path) -> tuple[str, ...]:
    """Tritonserver's options for mutual TLS over gRPC, and a header without which no protocol allows inference."""
    return (
        "--grpc-use-ssl=1",
        "--grpc-use-ssl-mutual=1",
        f"--grpc-server-cert={certificates / 'server.pem'}",
        f"--grpc-server-key={certificates / 'server.key'}",
        f"--grpc-root-cert={certificates / 'ca.pem'}",
        f"--grpc-restricted-protocol=inference:key={KEY}",
        f"--http-restricted-api=inference:{HTTP_HEADER}={KEY}",
    )


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
            with (
                self._context.wrap_socket(plain, server_side=True) as client,
                socket.create_connection(self._target, 20) as server,
            ):
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
