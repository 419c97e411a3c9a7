"""The command `python -m server`: the embedded server in the foreground."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from server.artefacts import artefact_warnings
from server.checks import is_loopback, resolve_host
from server.embedded import EmbeddedServer
from server.errors import ServerError
from server.line_writer import LineWriter
from server.request_log import (
    FORMAT_VARIABLE,
    FORMATS,
    LEFT_OUT,
    format_line,
    read_format,
    with_time,
    without_request_lines,
)
from server.triton import READY_TIMEOUT_S, STOP_TIMEOUT_S
from server.watchdog import MAX_RESTARTS

CUT = 3
"""The exit status where the time for requests to finish wasn't enough."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a model repository until SIGINT or SIGTERM.

    Returns:
        0 after a requested stop, CUT where requests had to be cut for it, 1 where the server could not start or died.
    """
    options = _parse(arguments)
    if options.log_format:
        os.environ[FORMAT_VARIABLE] = options.log_format
    output = LineWriter(sys.stdout.fileno(), _describe_loss)
    try:
        return _run(options, output)
    except ServerError as error:
        return _fail(error, show_log=False)
    finally:
        output.close()


def _run(options: argparse.Namespace, output: LineWriter) -> int:
    shows_requests = not options.no_request_log
    server = EmbeddedServer(
        options.model_repository,
        host=options.host,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        metrics_host=options.metrics_host,
        log_verbose=options.log_verbose,
        ready_timeout_s=options.ready_timeout_s,
        stop_timeout_s=options.stop_timeout_s,
        extra_arguments=options.extra_arguments,
        on_log=_log_printer(shows_requests) if options.verbose or options.log_verbose else None,
        on_request=(lambda line: output.write(with_time(line, time.time()))) if shows_requests else None,
        on_event=lambda sentence: print(sentence, file=sys.stderr, flush=True),
        front=not options.no_front,
        expose_internals=options.expose_internals,
        max_restarts=options.max_restarts,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.request_stop())
    try:
        _serve(server, options)
    except ServerError as error:
        if not server.stop_requested:
            return _fail(error, show_log=not options.verbose)
    finally:
        num_cut = server.stop()
    if num_cut:
        print(
            f"{_requests(num_cut)} not finished within {options.stop_timeout_s:g} s, and answered UNAVAILABLE.",
            file=sys.stderr,
        )
    return CUT if num_cut else 0


def _requests(number: int) -> str:
    return "1 request was" if number == 1 else f"{number} requests were"


def _serve(server: EmbeddedServer, options: argparse.Namespace) -> None:
    for option, host in (("--host", options.host), ("--metrics-host", options.metrics_host)):
        if not is_loopback(resolve_host(host, option)):
            print(
                f"Warning: with {option} {host} other machines reach this server, and it has no authentication or "
                f"encryption of its own.",
                file=sys.stderr,
            )
    if options.no_front or options.expose_internals:
        what = "there is no front" if options.no_front else "the front lets everything through"
        print(
            f"Warning: {what}: whoever reaches this server can end it, and read what others ask of it.", file=sys.stderr
        )
    for sentence in artefact_warnings(options.model_repository):
        print(f"Warning: {sentence}", file=sys.stderr)
    server.start()
    print(
        f"Ready: http://{server.http_url} grpc://{server.grpc_url} metrics http://{server.metrics_url}/metrics "
        f"(Ctrl-C stops)",
        flush=True,
    )
    server.wait()


def _fail(error: ServerError, *, show_log: bool) -> int:
    print(f"error: {error}", file=sys.stderr)
    if show_log and error.log_tail:
        print(f"\nThe end of tritonserver's log:\n{error.log_tail}", file=sys.stderr)
    return 1


def _log_printer(shows_requests: bool) -> Callable[[str], None]:
    """Return what prints Triton's log: without the lines of requests, where those are printed anyhow."""
    return lambda lines: print(without_request_lines(lines) if shows_requests else lines, end="", file=sys.stderr)


def _describe_loss(lines: int) -> str:
    return with_time(format_line(LEFT_OUT, {"lines": lines}, read_format()), time.time())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Serve a model repository with the Triton Inference Server of the nvidia-pytriton wheel.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model-repository", type=Path, required=True, metavar="DIR", help="folder that `python -m export` wrote")
    add("--host", default="127.0.0.1", help="IPv4 address for HTTP and gRPC; there is no authentication")
    add("--http-port", type=int, default=8000, metavar="PORT", help="0 picks a free port")
    add("--grpc-port", type=int, default=8001, metavar="PORT", help="0 picks a free port")
    add("--metrics-port", type=int, default=8002, metavar="PORT", help="0 picks a free port")
    add("--metrics-host", default="127.0.0.1", metavar="HOST", help="IPv4 address for the Prometheus metrics")
    add("--ready-timeout-s", type=float, default=READY_TIMEOUT_S, metavar="S", help="time for all models to load")
    add(
        "--stop-timeout-s",
        type=float,
        default=STOP_TIMEOUT_S,
        metavar="S",
        help="time for requests to finish at the end",
    )
    add(
        "--max-restarts",
        type=int,
        default=MAX_RESTARTS,
        metavar="N",
        help="times in a row that what has died is started again, before the server ends; 0 for never",
    )
    add(
        "--expose-internals",
        action="store_true",
        help="let through what isn't public: stages, statistics, shared memory, logging; on loopback alone",
    )
    add("--no-front", action="store_true", help="let Triton itself listen on the ports, unprotected: for comparisons")
    add("--no-request-log", action="store_true", help="don't show a line on stdout for each request")
    add("--log-format", choices=FORMATS, help=f"of these lines; without it, the variable {FORMAT_VARIABLE} tells")
    add("--verbose", action="store_true", help="show Triton's log on stderr")
    add("--log-verbose", type=int, default=0, metavar="LEVEL", help="Triton's verbose logging level; implies --verbose")
    add("extra_arguments", nargs="*", metavar="OPTION", help="after `--`: options for tritonserver itself")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
