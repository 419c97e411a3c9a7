"""The widgets of the page and their events."""

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple

import gradio as gr

from audioldm2_client._client import AudioLDM2Client
from audioldm2_client._exceptions import AudioLDM2Error, ModelNotFoundError, RequestCancelledError
from audioldm2_client._exit_status import first_line
from audioldm2_client._generation import Generation
from audioldm2_client._jobs import POLL_INTERVAL_S, Progress
from audioldm2_client._options import Option
from audioldm2_client._result import GenerationResult
from audioldm2_client._ui import markup
from audioldm2_client._ui.form import FIELDS, read_options
from audioldm2_client._ui.session import ClosedSessionError, Entry, Session, Sessions
from audioldm2_client._ui.snippets import Connection, as_curl, as_python

FIELDS_IN_A_ROW = 3

Updates = dict[Any, Any]
"""What changes on the page, by widget."""


class Outputs(NamedTuple):
    """The widgets that a generation changes."""

    status: Any
    results: Any
    generate: Any
    again: Any
    cancel: Any
    history: Any
    python: Any
    curl: Any


class Page:
    """The page of all tabs; each tab has its own session.

    Args:
        client: generates; the page doesn't close it.
        connection: the settings of the client that may be shown.
        sessions: of the tabs.
    """

    def __init__(self, client: AudioLDM2Client, connection: Connection, sessions: Sessions) -> None:
        self._client = client
        self._connection = connection
        self._sessions = sessions
        with gr.Blocks(title="AudioLDM 2", analytics_enabled=False) as self.blocks:
            gr.Markdown("# AudioLDM 2")
            with gr.Row():
                with gr.Column():
                    self._inputs = _make_form()
                    with gr.Row():
                        buttons = _make_buttons()
                    history = _make_history()
                with gr.Column():
                    self._outputs = Outputs(gr.HTML(elem_id="status"), gr.HTML(elem_id="results"), *buttons, *history)
            self._connect()
        self.blocks.queue(default_concurrency_limit=None)  # Triton has its own queue

    def _connect(self) -> None:
        outputs, inputs = self._outputs, list(self._inputs.values())
        changed = list(outputs)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([outputs.generate.click, self._inputs["prompt"].submit], self._generate, inputs, changed, **quiet)
        outputs.again.click(self._generate_again, inputs, changed, **quiet)
        outputs.cancel.click(self._cancel, None, None, **quiet)
        outputs.history.input(
            self._look_back, outputs.history, [outputs.results, outputs.python, outputs.curl], **quiet
        )
        self.blocks.unload(self._close)

    def _generate(self, request: gr.Request, *values: Any) -> Iterator[Updates]:
        yield from self._run(self._sessions.of(request.session_hash), dict(zip(self._inputs, values, strict=True)))

    def _generate_again(self, request: gr.Request, *values: Any) -> Iterator[Updates]:
        session = self._sessions.of(request.session_hash)
        seed = session.entries[-1].options["seed"] if session.entries else ""
        yield from self._run(session, dict(zip(self._inputs, values, strict=True)) | {"seed": str(seed)})

    def _cancel(self, request: gr.Request) -> None:
        self._sessions.of(request.session_hash).cancel()

    def _close(self, request: gr.Request) -> None:
        self._sessions.forget(request.session_hash)

    def _look_back(self, number: int, request: gr.Request) -> Updates:
        entry = self._sessions.of(request.session_hash).entry(number)
        return {self._outputs.results: gr.skip()} if entry is None else self._shown(entry)

    def _run(self, session: Session, values: Mapping[str, Any]) -> Iterator[Updates]:
        """Generate, and show the progress and the outcome."""
        start = time.monotonic()
        try:
            options = read_options(values)
            generation = session.start(self._client, options)
            yield self._running()
            result = yield from self._watch(generation)
            entry = session.keep(result, options, time.monotonic() - start)
        except ClosedSessionError:
            return
        except RequestCancelledError:
            yield self._over(session, markup.cancelled())
        except (AudioLDM2Error, TypeError, ValueError, OSError, RuntimeError) as error:
            yield self._over(session, markup.failure(first_line(error)))
        else:
            yield {**self._over(session, markup.done(entry)), **self._shown(entry), **self._listed(session)}

    def _watch(self, generation: Generation) -> Generator[Updates, None, GenerationResult]:
        """Show the progress until there is a result; cancel the generation if the tab is closed before."""
        try:
            for progress in _progress_of(generation):
                yield {self._outputs.status: markup.progress(progress)}
            return generation.result()
        finally:
            if not generation.done():
                generation.cancel()

    def _running(self) -> Updates:
        outputs = self._outputs
        return {
            outputs.status: markup.progress(None),
            outputs.generate: gr.update(interactive=False),
            outputs.again: gr.update(interactive=False),
            outputs.cancel: gr.update(interactive=True),
        }

    def _over(self, session: Session, status: str) -> Updates:
        outputs = self._outputs
        return {
            outputs.status: status,
            outputs.generate: gr.update(interactive=True),
            outputs.again: gr.update(interactive=bool(session.entries)),
            outputs.cancel: gr.update(interactive=False),
        }

    def _shown(self, entry: Entry) -> Updates:
        return {
            self._outputs.results: markup.results(entry),
            self._outputs.python: as_python(entry.options, self._connection),
            self._outputs.curl: as_curl(entry.options, self._connection),
        }

    def _listed(self, session: Session) -> Updates:
        choices = [(markup.label(entry), entry.number) for entry in reversed(session.entries)]
        return {self._outputs.history: gr.update(choices=choices, value=choices[0][1])}


def _progress_of(generation: Generation) -> Iterator[Progress]:
    """Yield the progress until the generation is over; nothing where the server can't tell it."""
    has_jobs = True
    while not generation.done():
        with contextlib.suppress(TimeoutError, AudioLDM2Error):
            generation.result(POLL_INTERVAL_S)
        if has_jobs and not generation.done():
            try:
                yield generation.progress()
            except ModelNotFoundError:
                has_jobs = False
            except AudioLDM2Error:  # it may answer next time
                continue


def _make_form() -> dict[str, Any]:
    """Return the widgets by the names of the arguments that they stand for: texts first, then rows of short ones."""
    form: dict[str, Any] = {
        "prompt": gr.Textbox(label="Prompt", placeholder="a dog barking in the rain", elem_id="prompt", autofocus=True)
    }
    texts = [name for name, option in FIELDS.items() if option.one_per_prompt]
    form |= {name: _make_field(name, FIELDS[name]) for name in texts}
    others = [name for name in FIELDS if name not in texts]
    for start in range(0, len(others), FIELDS_IN_A_ROW):
        with gr.Row():
            form |= {name: _make_field(name, FIELDS[name]) for name in others[start : start + FIELDS_IN_A_ROW]}
    return form


def _make_field(name: str, option: Option) -> Any:
    """Return the widget of an option. Numbers are text as well: the server has the bounds, and names them."""
    if option.suggestions:
        choices = [("the server's default", ""), *option.suggestions]
        return gr.Dropdown(choices, value="", label=option.label, allow_custom_value=True, elem_id=name)
    return gr.Textbox(label=option.label, placeholder=option.default, elem_id=name, min_width=110)


def _make_buttons() -> tuple[Any, Any, Any]:
    generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=110)
    again = gr.Button("Same seed again", interactive=False, elem_id="again", min_width=110)
    cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel", min_width=110)
    return generate, again, cancel


def _make_history() -> tuple[Any, Any, Any]:
    history = gr.Radio([], label="History of this tab", elem_id="history")
    with gr.Tab("Python"):
        python = gr.Code(language="python", show_label=False, interactive=False, elem_id="python")
    with gr.Tab("curl"):
        curl = gr.Code(language="shell", show_label=False, interactive=False, elem_id="curl")
    return history, python, curl
