"""Servers between a client and Triton, on real sockets: one that answers by itself, a relay, and a proxy."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Self


class TcpServer:
    """Hands each connection to `serve`, in a thread of its own."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def serve(self, near: socket.socket) -> None:
        raise NotImplementedError

    def keep(self, connection: socket.socket) -> socket.socket:
        """Remember a connection, to close it at the end."""
        self._connections.append(connection)
        return connection

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self.keep(self._listening.accept()[0])
                self._threads.append(threading.Thread(target=self._serve, args=(near,)))
                self._threads[-1].start()

    def _serve(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.serve(near)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._threads[0].join()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for connection in self._connections:
            connection.close()


class Answering(TcpServer):
    """Reads a request of HTTP/1.1 or whatever comes, sends bytes, and hangs up.

    Args:
        answer: the bytes, or how they follow from what arrived.
    """

    def __init__(self, answer: bytes | Callable[[bytes], bytes]) -> None:
        self.arrived: list[bytes] = []
        self._answer = answer
        super().__init__()

    def serve(self, near: socket.socket) -> None:
        request = near.recv(65536)
        head, _, body = request.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        while len(body) < int(fields.get(b"content-length", 0)):
            body += (more := near.recv(65536))
            request += more
        self.arrived.append(request)
        near.sendall(self._answer(request) if callable(self._answer) else self._answer)
        near.shutdown(socket.SHUT_RDWR)


class Relay(TcpServer):
    """Passes bytes on to a server, until it forgets its connections: then it takes them and passes nothing on.

    Args:
        target: "host:port" of the server.
        forgets_after_s: how long nothing may pass before it forgets all connections by itself.
    """

    def __init__(self, target: str, forgets_after_s: float = float("inf")) -> None:
        host, port = target.split(":")
        self._target = (host, int(port))
        self._forgets_after_s = forgets_after_s
        self._passed_s = time.monotonic()
        self._forgotten: set[socket.socket] = set()
        super().__init__()

    def forget(self) -> None:
        """Forget, without a word, all connections that there are; new ones work."""
        self._forgotten.update(self._connections)

    def serve(self, near: socket.socket) -> None:
        far = self.keep(self.connect(near))
        back = threading.Thread(target=self._copy, args=(far, near))
        back.start()
        self._copy(near, far)
        back.join()

    def connect(self, near: socket.socket) -> socket.socket:  # noqa: ARG002
        return socket.create_connection(self._target)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(65536):
                if time.monotonic() - self._passed_s > self._forgets_after_s:
                    self.forget()
                if source not in self._forgotten:
                    target.sendall(block)
                    self._passed_s = time.monotonic()
            if source not in self._forgotten:
                target.shutdown(socket.SHUT_RDWR)


class Proxy(Relay):
    """An HTTP proxy: CONNECT, and requests with an absolute URL; every host is the one target."""

    def __init__(self, target: str) -> None:
        self.asked: list[str] = []
        super().__init__(target)

    def connect(self, near: socket.socket) -> socket.socket:
        head = b""
        while b"\r\n\r\n" not in head:
            head += near.recv(1)
        line = head.split(b"\r\n", 1)[0].decode()
        self.asked.append(line.rpartition(" ")[0])
        far = super().connect(near)
        if line.startswith("CONNECT "):
            near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            far.sendall(head)
        return far
