"""The page as a web application: Gradio and the results' files, behind the guard."""

import asyncio
import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any

import fastapi
import gradio as gr
import uvicorn
from fastapi.responses import FileResponse, PlainTextResponse

from audioldm2_client._client import AudioLDM2Client
from audioldm2_client._command_signals import CommandSignals
from audioldm2_client._ui.guard import Guard
from audioldm2_client._ui.markup import RESULTS_PATH, STYLE
from audioldm2_client._ui.session import Sessions

SHUTDOWN_S = 1
"""Time that open connections get at the end."""


def make_app(blocks: gr.Blocks, sessions: Sessions, allowed_hosts: frozenset[str] | None) -> Guard:
    """Return the ASGI application of the page.

    Args:
        blocks: the page.
        sessions: the results that are served, at `/results/`.
        allowed_hosts: as `guard.refusal` takes them.
    """
    app = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get(f"{RESULTS_PATH}{{name:path}}")
    def result(name: str) -> fastapi.Response:
        path = sessions.file(name)
        return PlainTextResponse("there is no such result", 404) if path is None else FileResponse(path)

    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_make_theme(),
        css=STYLE,
    )
    return Guard(app, allowed_hosts)


def _make_theme() -> Any:
    """Return Gradio's default theme with the machine's fonts; its own would be loaded from elsewhere."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def serve(app: Guard, listener: socket.socket, signals: CommandSignals, client: AudioLDM2Client) -> None:
    """Serve until a signal; it also cancels what the client runs, which visitors' requests wait for."""
    config = uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=SHUTDOWN_S)
    server = _Server(config)
    with close_when(server.ends, client), signals.calling(server.end):
        asyncio.run(server.serve(sockets=[listener]))


@contextlib.contextmanager
def close_when(ends: "queue.SimpleQueue[None]", client: AudioLDM2Client) -> Iterator[None]:
    """Close the client as soon as something is in the queue, or the block is left."""

    def close() -> None:
        ends.get()
        client.close()

    closing = threading.Thread(target=close, name="audioldm2-end", daemon=True)
    closing.start()
    try:
        yield
    finally:
        ends.put(None)
        closing.join()


class _Server(uvicorn.Server):
    """A server that leaves signals to the command.

    Attributes:
        ends: gets an item when it is to end.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ends: queue.SimpleQueue[None] = queue.SimpleQueue()

    def end(self) -> None:
        """Begin to end; for a signal handler."""
        self.should_exit = True
        self.ends.put(None)

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Install no handlers."""
        return contextlib.nullcontext()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections. Each tab keeps one open, so uvicorn's errors about it aren't logged."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
