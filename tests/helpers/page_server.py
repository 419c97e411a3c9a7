"""The command `audioldm2 ui` in a process of its own, which notes every address that it connects to."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

_WATCHED = """
import os, sys
with open(sys.argv[1], "a", buffering=1) as note:
    def watch(event, arguments):
        if event == "socket.connect":
            note.write(f"{arguments[1]!r}\\n")
        elif event == "socket.getaddrinfo":
            note.write(f"({arguments[0]!r}, {arguments[1]!r})\\n")
    sys.addaudithook(watch)
    from audioldm2_client._cli.main import main
    sys.exit(main(["ui", *sys.argv[2:]]))
"""


class PageServer:
    """A context manager: serves while it is open.

    Attributes:
        url: of the page.
    """

    def __init__(self, folder: Path, triton_url: str, *options: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._note = folder / "connections"
        arguments = ["--port", "0", "--url", triton_url, *options]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WATCHED, str(self._note), *arguments],
            env=environment(self.temporary),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors: list[str] = []
        self._reader = threading.Thread(target=lambda: self._errors.extend(self.process.stderr or ()))
        self._reader.start()

    def __enter__(self) -> "PageServer":
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        found = re.search(r"http://\S+", first)
        if found is None:
            self.end()
        assert found is not None, first + self.errors
        self.url = found[0]
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def errors(self) -> str:
        """What it has written to stderr."""
        return "".join(self._errors)

    @property
    def connections(self) -> set[str]:
        """The addresses that its Python code has connected to or looked up."""
        return set(self._note.read_text().splitlines())

    def end(self, number: int = signal.SIGINT) -> int:
        """End it by a signal, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(10)
            for stream in (self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()


def environment(temporary: Path) -> dict[str, str]:
    """The environment of the command, with a folder for temporary files that a test can look into."""
    return {**os.environ, "TMPDIR": str(temporary)}
