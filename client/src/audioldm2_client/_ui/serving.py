"""The page as a web application: Gradio and the results' files, behind the guard."""

import asyncio
import logging
import socket
from typing import Any

import fastapi
import gradio as gr
import uvicorn
from fastapi.responses import FileResponse, PlainTextResponse

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


def serve(app: Guard, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, which raise KeyboardInterrupt here."""
    config = uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=SHUTDOWN_S)
    asyncio.run(_Server(config).serve(sockets=[listener]))


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections. Each tab keeps one open, so uvicorn's errors about it aren't logged."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
