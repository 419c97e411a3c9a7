"""The command `audioldm2`: prompts in, audio files out."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from audioldm2_client import _audio_file, _exit_status, _spectrogram
from audioldm2_client._cli import playback, report
from audioldm2_client._cli.options import make_parser, parse
from audioldm2_client._cli.progress_bar import GenerationBar, is_terminal
from audioldm2_client._client import AudioLDM2Client
from audioldm2_client._command_signals import CommandSignals
from audioldm2_client._exceptions import AudioLDM2Error
from audioldm2_client._exit_status import fail, status_of
from audioldm2_client._options import given_options
from audioldm2_client._result import GenerationResult
from audioldm2_client._server_options import client_settings

PAGE = "ui"
"""As the first argument this isn't a prompt: it starts the page."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    signals = CommandSignals()
    try:
        with signals:
            return _dispatch(argv, signals)
    except KeyboardInterrupt:
        return _end(signals)
    except OSError:  # after SIGHUP nothing can be written to the terminal any more
        if signals.received is None:
            raise
        return _end(signals)


def _dispatch(argv: Sequence[str], signals: CommandSignals) -> int:
    if argv and argv[0] == PAGE:
        from audioldm2_client._ui.command import main as serve_page

        return serve_page(argv[1:], signals)
    arguments = parse(make_parser(), argv)
    if arguments.prompts is not None:
        from audioldm2_client._cli.batch_command import run_batch_command

        return run_batch_command(arguments, signals)
    return _run(arguments)


def _end(signals: CommandSignals) -> int:
    return fail(signals.words, signals.status)


def _run(arguments: argparse.Namespace) -> int:
    try:
        player = _check_outputs(arguments)
        client = AudioLDM2Client(**client_settings(arguments))
    except (ValueError, OSError) as error:
        return fail(error, _exit_status.USAGE)
    try:
        with client, GenerationBar(shown=is_terminal() and not arguments.no_progress) as bar:
            start = time.monotonic()
            result = client.generate(
                arguments.prompt,
                request_id=arguments.request_id,
                traceparent=os.environ.get("TRACEPARENT"),
                tracestate=os.environ.get("TRACESTATE"),
                on_progress=bar,
                **given_options(vars(arguments)),
            )
            elapsed_s = time.monotonic() - start
    except AudioLDM2Error as error:
        return fail(error, status_of(error))
    try:
        paths = _save(result, arguments)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: soundfile's, such as a full disk
        return fail(f"can't write {str(arguments.output)!r}: {error}", _exit_status.FAULT)
    _print(result, paths, elapsed_s, as_json=arguments.json)
    return _play(player, paths[0])


def _check_outputs(arguments: argparse.Namespace) -> list[str] | None:
    """Check before the generation that its files can be written and played; return the player's command."""
    _audio_file.check_path(arguments.output)
    if arguments.spectrogram is not None:
        _spectrogram.check(arguments.spectrogram)
    return playback.find_player(arguments.output) if arguments.play else None


def _save(result: GenerationResult, arguments: argparse.Namespace) -> list[Path]:
    paths = report.save(result, arguments.output)
    if arguments.spectrogram is not None:
        _spectrogram.write(arguments.spectrogram, result.audio[0])
    return paths


def _print(result: GenerationResult, paths: list[Path], elapsed_s: float, *, as_json: bool) -> None:
    if truncated := int(result.truncated_tokens.max()):
        print(f"audioldm2: the prompt is too long: its last {truncated} tokens had no effect", file=sys.stderr)
    if as_json:
        print(json.dumps(report.as_json(result, paths, elapsed_s), ensure_ascii=False))
        return
    print("\n".join(report.lines(result, paths)))
    print(f"seed {result.seed}, generated in {elapsed_s:.1f} s")


def _play(player: list[str] | None, path: Path) -> int:
    if player is not None:
        sys.stdout.flush()
        try:
            playback.play(player, path)
        except OSError as error:
            return fail(f"can't play {str(path)!r}: {error}", _exit_status.FAULT)
    return 0
