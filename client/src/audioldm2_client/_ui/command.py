"""The command `audioldm2 ui`."""

import argparse
import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audioldm2_client import _exit_status
from audioldm2_client._client import AudioLDM2Client
from audioldm2_client._command_signals import CommandSignals
from audioldm2_client._exit_status import fail
from audioldm2_client._server_options import add_server_options, client_settings

if TYPE_CHECKING:
    from audioldm2_client._ui.snippets import Connection

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7860

_EPILOG = """\
examples:
  audioldm2 ui
  audioldm2 ui --port 8080 --url gpu.example:8001

The page has no password: everyone who can reach it can use the server with the credentials given here. It listens on
loopback unless --host says otherwise. Ctrl-C ends it and cancels its generations; pressed again, it ends at once.

exit status: 0 ended by Ctrl-C, SIGTERM or SIGHUP; 2 bad usage, or the port is in use.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="audioldm2 ui",
        description="Serve a page to generate with, in a browser.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    page = parser.add_argument_group("page")
    page.add_argument("--host", default=DEFAULT_HOST, help="address to listen on; default: %(default)s")
    page.add_argument(
        "--port", type=_port, default=DEFAULT_PORT, help="port to listen on, 0 picks a free one; default: %(default)s"
    )
    add_server_options(parser.add_argument_group("server"))
    return parser


def main(argv: Sequence[str], signals: CommandSignals) -> int:
    """Serve the page until a signal ends it; return the exit status."""
    arguments = make_parser().parse_args(argv)
    if find_spec("gradio") is None:
        return fail("the page needs Gradio; install it with: pip install 'audioldm2-client[ui]'", _exit_status.USAGE)
    try:
        settings = client_settings(arguments)
        client = AudioLDM2Client(**settings)
        listener = _listen(arguments.host, arguments.port)
    except (ValueError, OSError) as error:
        return fail(error, _exit_status.USAGE)
    folder = tempfile.TemporaryDirectory(prefix="audioldm2-ui-")
    with contextlib.suppress(KeyboardInterrupt), client, listener, folder as name:
        _serve(client, settings, listener, Path(name), signals)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, or raise OSError with a sentence for the user."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} of {host} is in use; choose another with --port, or 0 for a free one"
        else:
            reason = f"can't listen on port {port} of {host!r}: {error.strerror or error}; see --host and --port"
        raise OSError(reason) from error
    return listener


def _serve(
    client: AudioLDM2Client,
    settings: Mapping[str, Any],
    listener: socket.socket,
    folder: Path,
    signals: CommandSignals,
) -> None:
    # Read when Gradio is imported.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / "gradio")}
    from audioldm2_client._ui.guard import LOOPBACK_NAMES
    from audioldm2_client._ui.page import Page
    from audioldm2_client._ui.serving import make_app, serve
    from audioldm2_client._ui.session import Sessions

    host, port = listener.getsockname()[:2]
    with contextlib.closing(Sessions(folder)) as sessions:
        page = Page(client, _shown_connection(settings), sessions)
        app = make_app(page.blocks, sessions, LOOPBACK_NAMES if ip_address(host).is_loopback else None)
        shown_host = f"[{host}]" if ":" in host else host
        print(f"audioldm2: the page is at http://{shown_host}:{port} (Ctrl-C ends it)", flush=True)
        serve(app, listener, signals, client)


def _shown_connection(settings: Mapping[str, Any]) -> "Connection":
    from audioldm2_client._ui.snippets import Connection

    return Connection(
        urls=settings["url"],
        model_name=settings["model_name"],
        timeout_s=settings["timeout_s"],
        tls=settings["tls"],
        header_names=tuple(settings["headers"]),
    )


def _port(text: str) -> int:
    port = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535; got {text!r}")
    return port
