"""What the door counts, in Prometheus' text format, and the small HTTP endpoint that gives it to Envoy.

Triton's own metrics go when it dies; these stay, so they also say whether the server is ready, and what was restarted.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

OUTCOMES = (
    ("refused", "NOT_FOUND"),
    ("refused", "INVALID_ARG"),
    ("refused", "UNAVAILABLE"),
    ("left", "CANCELLED"),
    ("lost", "UNAVAILABLE"),
    ("deadline", "DEADLINE"),
    ("failed", "INTERNAL"),
)
"""What the front tells of requests: outcome and reason."""

TRITONSERVER, FRONT = "tritonserver", "front"
READ_TIMEOUT_S = 5.0
_UNQUOTED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class DoorMetrics:
    """Counts what the front decides by itself, and keeps what the runner tells it."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter(dict.fromkeys(OUTCOMES, 0))
        self.restarts: dict[str, int] = {TRITONSERVER: 0, FRONT: 0}
        self.processes: dict[str, int] = {}

    def text(self, *, num_live: int, is_ready: bool) -> str:
        """Return all metrics in Prometheus' text format.

        Args:
            num_live: Requests that are with Triton.
            is_ready: Whether requests are let through.
        """
        memory = {name: size for name, pid in self.processes.items() if (size := resident_bytes(pid))}
        return "".join(
            [
                _family(
                    "audioldm2_front_requests_total",
                    "counter",
                    "Requests that the front refused, or whose caller or server went away",
                    [({"outcome": o, "reason": r}, count) for (o, r), count in self.requests.items()],
                ),
                _family("audioldm2_front_live_requests", "gauge", "Generations that are with Triton", [({}, num_live)]),
                _family("audioldm2_server_ready", "gauge", "1 where requests are let through", [({}, int(is_ready))]),
                _family(
                    "audioldm2_server_restarts_total",
                    "counter",
                    "Restarts, by the process that died or stalled",
                    [({"process": name}, count) for name, count in self.restarts.items()],
                ),
                _family(
                    "audioldm2_process_resident_memory_bytes",
                    "gauge",
                    "Resident memory, shared pages included",
                    [({"process": name}, size) for name, size in memory.items()],
                ),
            ]
        )


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


async def serve_metrics(path: str, text: Callable[[], str]) -> asyncio.Server:
    """Answer each HTTP request on a Unix socket with the metrics; Envoy alone asks there.

    Args:
        path: Of the socket.
        text: Gives them.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(READ_TIMEOUT_S):
                await reader.readuntil(b"\r\n\r\n")
                body = text().encode()
                head = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len(body)}"
                writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
                await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(answer, path)


def _family(name: str, kind: str, description: str, values: Sequence[tuple[Mapping[str, str], float]]) -> str:
    lines = [f"# HELP {name} {description}", f"# TYPE {name} {kind}"]
    for labels, value in values:
        pairs = ",".join(f'{key}="{label.translate(_UNQUOTED)}"' for key, label in labels.items())
        lines.append(f"{name}{{{pairs}}} {value}" if pairs else f"{name} {value}")
    return "\n".join(lines) + "\n"
