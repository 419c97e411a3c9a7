"""The process of the front: the door, and Envoy as its child.

Standard input carries orders, one in a line:

- `restarts PROCESS=N ...` and `processes NAME=PID ...`: what the metrics tell; by the latter the front
  also finds where the stages say that they have no room;
- `unavailable SENTENCE`: refuse everything with the sentence, for Triton is started again; `available` ends that;
- `stop`: take no more generations. Answered with `idle`, once all that are with Triton are answered and sent;
- `cut`: cancel what is with Triton, and tell its callers that the server stops. Answered with `cut N`.

End of file ends the front. Standard output carries these answers, `ready` at the start, `fault SENTENCE` where an
answer of Triton's shows that it has to be ended, and for the operator lines of the log, `log LINE`.
"""

import argparse
import asyncio
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import grpc.aio

from server.errors import ServerError
from server.front.door import Door
from server.front.envoy import MAX_BODY_BYTES, Endpoints, ask_envoy, start_envoy
from server.front.metrics import TRITONSERVER, serve_metrics
from server.front.targets import Access
from server.line_writer import LineWriter
from server.request_log import LEFT_OUT, RequestLog, format_line, read_format
from server.supervisor import BoundedLog, model_folders
from server.triton import JOB_BOARDS

POLL_S = 0.02
KEPT_LOG_BYTES = 1 << 20
"""So much of the end of each log is kept at least, and twice as much at most."""
LOG_INTERVAL_S = 1.0
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 2 * MAX_BODY_BYTES)]


async def run(
    endpoints: Endpoints, access: Access, jobs_models: Sequence[str], folder: Path, output: LineWriter
) -> int:
    """Serve until standard input ends, or Envoy.

    Args:
        endpoints: Addresses.
        access: What can be reached.
        jobs_models: The job boards.
        folder: For Envoy's files.
        output: Standard output.

    Returns:
        0, or 1 if Envoy has ended by itself.
    """
    async with grpc.aio.insecure_channel(_grpc_target(endpoints.triton_grpc)) as triton:
        log = RequestLog(lambda line: output.write(f"log {line}"), read_format())

        def tell(line: str) -> None:
            output.write(line, is_needed=True)

        door = Door(access, jobs_models, triton, log, lambda sentence: tell(f"fault {sentence}"))
        pauses = asyncio.create_task(door.watch_for_pauses())
        server = grpc.aio.server(options=CHANNEL_OPTIONS)
        server.add_generic_rpc_handlers([door.service()])
        server.add_insecure_port(_grpc_target(endpoints.door))
        await server.start()
        metrics = await serve_metrics(endpoints.door_metrics.removeprefix("unix:"), door.metrics_text)
        envoy = await start_envoy(endpoints, folder)
        door.metrics.processes |= {"door": os.getpid(), "envoy": envoy.pid}
        tell("ready")
        orders = asyncio.create_task(_obey(door, endpoints.admin, tell))
        logs = asyncio.create_task(_keep_logs_short(folder))
        ended = asyncio.create_task(envoy.wait())
        await asyncio.wait([orders, ended], return_when=asyncio.FIRST_COMPLETED)
        has_failed = ended.done()
        if not has_failed:
            envoy.kill()
            await ended
        orders.cancel()
        pauses.cancel()
        logs.cancel()
        log.flush(at_end=True)
        metrics.close()
        await server.stop(None)
        return int(has_failed)


async def _obey(door: Door, admin: str, tell: Callable[[str], object]) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    idle: asyncio.Task[None] | None = None
    while line := (await reader.readline()).decode():
        order, _, rest = line.rstrip("\n").partition(" ")
        match order:
            case "unavailable":
                door.set_unavailable(rest)
            case "available":
                door.set_unavailable("")
            case "stop":
                door.stop()
                idle = idle or loop.create_task(_tell_when_idle(door, admin, tell))
            case "cut":
                tell(f"cut {door.cancel_all()}")
            case "restarts":
                door.metrics.restarts |= _numbers(rest)
            case "processes":
                own = {name: door.metrics.processes[name] for name in ("door", "envoy")}
                door.metrics.processes = _numbers(rest) | own
                triton = door.metrics.processes.get(TRITONSERVER, 0)
                door.full_models.set_folders(model_folders(JOB_BOARDS, triton))


def _numbers(text: str) -> dict[str, int]:
    """Read `NAME=NUMBER NAME=NUMBER`."""
    pairs = (word.rpartition("=") for word in text.split())
    return {name: int(number) for name, _, number in pairs}


async def _tell_when_idle(door: Door, admin: str, tell: Callable[[str], object]) -> None:
    while door.num_live or await _active_requests(admin):
        await asyncio.sleep(POLL_S)
    tell("idle")


async def _active_requests(admin: str) -> int:
    """Return how many requests Envoy still takes or answers."""
    statistics = await ask_envoy(admin, "GET /stats?filter=http.(http|grpc).downstream_rq_active")
    lines = [line for line in statistics.splitlines() if line.startswith("http.")]
    return sum(int(line.rpartition(": ")[2]) for line in lines)


def _describe_loss(lines: int) -> str:
    return f"log {format_line(LEFT_OUT, {'lines': lines}, read_format())}"


async def _keep_logs_short(folder: Path) -> None:
    """Release the start of long logs, for ever: of Envoy's, and of this process's standard error."""
    logs = [BoundedLog(path, KEPT_LOG_BYTES) for path in folder.glob("*.log")]
    while True:
        for log in logs:
            log.trim()
        await asyncio.sleep(LOG_INTERVAL_S)


def _grpc_target(endpoint: str) -> str:
    return endpoint if endpoint.startswith("unix:") else f"ipv4:{endpoint}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the front.

    Returns:
        0 after the end of standard input, 1 where Envoy can't be started or has died.
    """
    parser = argparse.ArgumentParser(prog="python -m server.front", description=__doc__)
    for endpoint in fields(Endpoints):
        parser.add_argument(f"--{endpoint.name.replace('_', '-')}", required=True, metavar="HOST:PORT|unix:PATH")
    parser.add_argument("--models", required=True, help="public models, with commas")
    parser.add_argument("--jobs-models", default="", help="job boards, with commas")
    parser.add_argument("--expose-internals", action="store_true", help="everything else can be reached, too")
    parser.add_argument("--folder", type=Path, required=True, help="private; Envoy's configuration and log go there")
    options = parser.parse_args(arguments)
    endpoints = Endpoints(**{endpoint.name: getattr(options, endpoint.name) for endpoint in fields(Endpoints)})
    runner = os.getppid()
    access = Access(frozenset(options.models.split(",")), options.expose_internals)
    output = LineWriter(sys.stdout.fileno(), _describe_loss)
    try:
        jobs_models = [model for model in options.jobs_models.split(",") if model]
        return asyncio.run(run(endpoints, access, jobs_models, options.folder, output))
    except ServerError as error:
        print(f"error: {error}\n{error.log_tail}", file=sys.stderr)
        return 1
    finally:
        output.close()
        if os.getppid() != runner:  # it was killed, and nobody else is left to do it
            shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
