"""The handle of a generation under asyncio. The twin of `_generation`."""

import asyncio
import weakref

from audioldm2_client._async_call import AsyncCall
from audioldm2_client._errors import cancelled_here_error
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


class AsyncGeneration:
    """A running generation; made by `AsyncAudioLDM2Client.submit`.

    Keep it: a generation whose handle is gone before the end is cancelled, because nobody can have its result.

    Attributes:
        id: the request's id, for the server's log. It is all that is needed to watch and cancel the generation.
    """

    def __init__(self, call: AsyncCall) -> None:
        self.id = call.request.id
        self._call = call
        weakref.finalize(self, call.abandon).atexit = False

    def done(self) -> bool:
        """Return whether it has ended, by a result or an error: `result` won't wait."""
        return self._call.done()

    async def result(self, timeout_s: float | None = None) -> GenerationResult:
        """Wait for the result. The generation continues if this ends early, by `timeout_s` or by cancelling the task.

        Args:
            timeout_s: time to wait for it here, seconds; None waits for as long as the generation may take.

        Raises:
            TimeoutError: not over after `timeout_s`.
            AudioLDM2Error: it failed, see `AsyncAudioLDM2Client.generate`; RequestCancelledError after `cancel`.
        """
        task = self._call.task
        if not (await asyncio.wait([task], timeout=timeout_s))[0]:
            raise TimeoutError(f"generation {self.id} isn't over after {timeout_s} s")
        if task.cancelled():
            raise cancelled_here_error(self._call.request)
        return task.result()

    async def progress(self) -> Progress:
        """Ask the server how far the generation is.

        Raises:
            ModelNotFoundError: the server has no model `jobs`, and so can't tell.
            AudioLDM2Error: the server couldn't be asked.
        """
        return await self._call.ask(JOBS_TIMEOUT_S)

    async def cancel(self) -> bool:
        """End the generation here and on the server; `result` then raises RequestCancelledError.

        A generation that is over isn't changed. This takes milliseconds; up to 2 s where the server doesn't answer.

        Returns:
            Whether the server was told. False where the generation is over, or where the server can't be reached or has
            no model `jobs` and may continue it.
        """
        return await self._call.cancel()

    async def watch(self, callback: ProgressCallback | None) -> None:
        """Call the callback with each change until the generation is over, or the server can't tell its progress."""
        watch = ProgressWatch(callback)
        while watch.wanted and not (await asyncio.wait([self._call.task], timeout=POLL_INTERVAL_S))[0]:
            try:
                progress = await self._call.ask(WATCH_TIMEOUT_S)
            except AudioLDM2Error as error:
                watch.note_failure(error)
            else:
                watch.report(progress)
