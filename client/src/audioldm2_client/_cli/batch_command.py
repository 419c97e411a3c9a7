"""The command `audioldm2 --prompts FILE --output-dir DIR`."""

import argparse
import asyncio
import json
from typing import Any, cast

from audioldm2_client import _exit_status
from audioldm2_client._async_client import AsyncAudioLDM2Client
from audioldm2_client._cli import report
from audioldm2_client._cli.batch import ServerGoneError, run_batch
from audioldm2_client._cli.options import (
    DEFAULT_CONCURRENCY,
    DEFAULT_RETRY_FOR_S,
)
from audioldm2_client._cli.progress_bar import BatchBar, is_terminal
from audioldm2_client._cli.prompts_file import PromptItem, read_prompts
from audioldm2_client._cli.results_folder import ResultsFolder
from audioldm2_client._command_signals import CommandSignals
from audioldm2_client._exceptions import AudioLDM2Error
from audioldm2_client._exit_status import fail, first_line, status_of
from audioldm2_client._options import given_options
from audioldm2_client._result import GenerationResult
from audioldm2_client._server_options import client_settings

CONTINUE = "run the same command again to continue"


def run_batch_command(arguments: argparse.Namespace, signals: CommandSignals) -> int:
    """Generate the results that are missing; return the exit status."""
    concurrency = DEFAULT_CONCURRENCY if arguments.concurrency is None else arguments.concurrency
    retry_for_s = DEFAULT_RETRY_FOR_S if arguments.retry_for is None else arguments.retry_for
    try:
        if not 1 <= concurrency <= 256:
            raise ValueError(f"--concurrency must be 1 to 256; got {concurrency}")
        if not 0 <= retry_for_s < float("inf"):
            raise ValueError(f"--retry-for must be at least 0 seconds; got {retry_for_s:g}")
        items = read_prompts(arguments.prompts, given_options(vars(arguments)), arguments.model)
        client = AsyncAudioLDM2Client(**client_settings(arguments), max_retries=0)
        folder = ResultsFolder(arguments.output_dir, arguments.format or "wav")
    except (ValueError, OSError) as error:
        return fail(error, _exit_status.USAGE)
    with folder:
        missing = [item for item in items if not folder.has(item)]
        report = _BatchReport(folder, arguments, signals, total=len(items), done=len(items) - len(missing))
        try:
            status = report.run(client, missing, concurrency, retry_for_s)
        except KeyboardInterrupt:
            report.bar.close()
            return fail(f"{signals.words}; {CONTINUE}", signals.status)
        finally:
            report.bar.close()
        report.summarize()
        return status


class _BatchReport:
    """Write and print the results and failures."""

    def __init__(
        self,
        folder: ResultsFolder,
        arguments: argparse.Namespace,
        signals: CommandSignals,
        *,
        total: int,
        done: int,
    ) -> None:
        self._folder = folder
        self._arguments = arguments
        self._signals = signals
        self._already = done
        self._made = 0
        self._failed: dict[int, int] = {}
        self.bar = BatchBar(total=total, done=done, shown=is_terminal() and not arguments.no_progress)

    def run(self, client: AsyncAudioLDM2Client, items: list[PromptItem], concurrency: int, retry_for_s: float) -> int:
        """Generate the items and return the exit status."""

        async def generate() -> None:
            loop, task = asyncio.get_running_loop(), cast("asyncio.Task[None]", asyncio.current_task())
            # Within the loop, an exception at any instruction could be lost, or leave a result half kept.
            with self._signals.calling(lambda: loop.call_soon_threadsafe(task.cancel)):
                async with client:
                    await run_batch(
                        client,
                        items,
                        concurrency=concurrency,
                        retry_for_s=retry_for_s,
                        on_result=self._keep,
                        on_failure=self._note_failure,
                    )

        try:
            asyncio.run(generate())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        except ServerGoneError as error:
            self.bar.close()
            reason = f"{first_line(error.__cause__)}; gave up after {retry_for_s:g} s; {CONTINUE}"
            return fail(reason, _exit_status.UNAVAILABLE)
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: soundfile's, such as a full disk
            self.bar.close()
            return fail(f"can't write to {str(self._arguments.output_dir)!r}: {error}", _exit_status.FAULT)
        return self._failed[min(self._failed)] if self._failed else 0

    def summarize(self) -> None:
        """Print how much was done, except among lines of JSON."""
        if not self._arguments.json:
            print(f"{self._made} made, {self._already} already there, {len(self._failed)} failed")

    def _keep(self, item: PromptItem, result: GenerationResult, elapsed_s: float) -> None:
        paths, record = self._folder.add(item, result, elapsed_s)
        self._made += 1
        for line in self._lines(result, paths, record):
            self.bar.print(line)
        self.bar.advance()

    def _lines(self, result: GenerationResult, paths: Any, record: dict[str, Any]) -> list[str]:
        if self._arguments.json:
            return [json.dumps(record, ensure_ascii=False)]
        return report.lines(result, paths)

    def _note_failure(self, item: PromptItem, error: AudioLDM2Error) -> None:
        self._failed[item.line] = status_of(error)
        self.bar.print(f"audioldm2: line {item.line}: {first_line(error)}", error=True)
        self.bar.advance()
