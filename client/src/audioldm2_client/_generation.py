"""The handle of a generation."""

import concurrent.futures
import queue
import weakref
from collections.abc import Callable

from audioldm2_client._call import Call
from audioldm2_client._cancel_token import CallCancelledError, CancelToken
from audioldm2_client._exceptions import AudioLDM2Error
from audioldm2_client._jobs import (
    JOBS_TIMEOUT_S,
    POLL_INTERVAL_S,
    WATCH_TIMEOUT_S,
    Progress,
    ProgressCallback,
    ProgressWatch,
)
from audioldm2_client._result import GenerationResult


class Generation:
    """A running generation; made by `AudioLDM2Client.submit`. Safe to use from several threads.

    Keep it: a generation whose handle is gone before the end is cancelled, because nobody can have its result.

    Attributes:
        id: the request's id, for the server's log. It is all that is needed to watch and cancel the generation.
    """

    def __init__(self, call: Call) -> None:
        self.id = call.request.id
        self._call = call
        weakref.finalize(self, call.abandon).atexit = False

    def done(self) -> bool:
        """Return whether it has ended, by a result or an error: `result` won't wait."""
        return self._call.future.done()

    def result(self, timeout_s: float | None = None) -> GenerationResult:
        """Wait for the result. The generation continues if this ends early, by `timeout_s` or by Ctrl-C.

        Args:
            timeout_s: time to wait for it here, seconds; None waits for as long as the generation may take.

        Raises:
            TimeoutError: not over after `timeout_s`.
            AudioLDM2Error: the generation failed, see `AudioLDM2Client.generate`; RequestCancelledError after `cancel`.
        """
        if not concurrent.futures.wait([self._call.future], timeout_s).done:
            raise TimeoutError(f"generation {self.id} isn't over after {timeout_s} s")
        return self._call.future.result()

    def progress(self) -> Progress:
        """Ask the server how far the generation is.

        Raises:
            ModelNotFoundError: the server has no model `jobs`, and so can't tell.
            AudioLDM2Error: the server couldn't be asked.
        """
        return self._call.ask(JOBS_TIMEOUT_S)

    def cancel(self) -> bool:
        """End the generation here and on the server; `result` then raises RequestCancelledError.

        A generation that is over isn't changed. This takes milliseconds; up to 2 s where the server doesn't answer.

        Returns:
            Whether the server was told. False where the generation is over, or where the server can't be reached or has
            no model `jobs` and may continue it.
        """
        return self._call.cancel()

    def watch(self, callback: ProgressCallback | None) -> None:
        """Call the callback with each change until the generation is over, or the server can't tell its progress.

        The server is asked in another thread. Ctrl-C is raised in the main one, at any instruction: in the callback of
        an event loop or in a destructor it would be lost.
        """
        if callback is None:
            return
        changes: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        token = CancelToken()
        self._call.future.add_done_callback(lambda _: token.cancel())
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            polling = executor.submit(self._poll, changes.put, token)
            try:
                while (progress := changes.get()) is not None:
                    callback(progress)
            finally:
                token.cancel()
            polling.result()

    def _poll(self, report: Callable[[Progress | None], object], token: CancelToken) -> None:
        """Report every change until cancelled, or until the server can't tell; then report None."""
        watch = ProgressWatch(report)
        try:
            while watch.wanted:
                token.sleep(POLL_INTERVAL_S)
                try:
                    progress = self._call.ask(WATCH_TIMEOUT_S, token)
                except AudioLDM2Error as error:
                    watch.note_failure(error)
                else:
                    watch.report(progress)
        except CallCancelledError:
            pass
        finally:
            report(None)
