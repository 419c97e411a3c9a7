"""A pseudo-terminal, as a user at a keyboard has one."""

import fcntl
import os
import pty
import select
import struct
import termios
import time


class Terminal:
    """A process on a pseudo-terminal of its own.

    Attributes:
        text: what it has written so far.
    """

    def __init__(self, *command: str) -> None:
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
            os.execv(command[0], command)  # noqa: S606 - no shell on purpose
        self.text = ""

    def read_until(self, words: str, timeout_s: float = 30) -> None:
        """Read until these words are in `text`; AssertionError where they don't come."""
        deadline = time.monotonic() + timeout_s
        while words not in self.text:
            assert time.monotonic() < deadline, f"no {words!r} in {self.text!r}"
            if not self.read(0.1):
                break
        assert words in self.text, self.text

    def press_ctrl_c(self) -> None:
        """Send what a keyboard would."""
        os.write(self._descriptor, b"\x03")

    def hang_up(self) -> int:
        """Close the terminal, as the end of an SSH session does, and return the exit status."""
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def wait(self) -> int:
        """Read to the end and return the exit status."""
        while self.read(30):
            pass
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._descriptor)
        return status

    def read(self, timeout_s: float) -> bool:
        """Add what is written within that time to `text`; False at the end."""
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return True
        try:
            block = os.read(self._descriptor, 4096)
        except OSError:  # Linux: no process has the terminal open any more
            return False
        self.text += block.decode(errors="replace")
        return bool(block)
