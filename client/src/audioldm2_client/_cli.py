"""The command `audioldm2`: one prompt in, audio files out."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from audioldm2_client import _audio_file
from audioldm2_client._client import AudioLDM2Client
from audioldm2_client._core import DEFAULT_TIMEOUT_S
from audioldm2_client._exceptions import (
    AudioLDM2Error,
    DeadlineExceededError,
    InvalidRequestError,
    ServerBusyError,
    ServerUnreachableError,
)
from audioldm2_client._result import GenerationResult

EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_DEADLINE = 4
EXIT_INTERRUPTED = 130

_EPILOG = """\
The server's defaults hold for every option that isn't given; AUDIOLDM2_URL sets the default of --url.

exit status: 0 done; 1 the server failed or the file could not be written; 2 bad usage, or the server refuses a value;
3 server busy or unreachable, try again later; 4 not done within --timeout; 130 interrupted
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="audioldm2",
        description="Generate sound from text on a Triton server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to hear")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help=".wav or .flac")
    parser.add_argument(
        "--url", default=os.environ.get("AUDIOLDM2_URL") or "localhost:8001", help="HOST:PORT or http://HOST:PORT"
    )
    parser.add_argument("--model", metavar="NAME", default="audioldm2", help="ensemble on the server")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to hear")
    parser.add_argument("--steps", metavar="N", type=int, help="denoising steps")
    parser.add_argument("--guidance-scale", metavar="X", type=float, help="how closely to follow the prompt")
    parser.add_argument("--length", metavar="SECONDS", type=float, help="length of the audio")
    parser.add_argument("--candidates", metavar="N", type=int, help="waveforms, best first: FILE-1, FILE-2, ...")
    parser.add_argument("--seed", metavar="N", type=int, help="equal seeds give equal audio")
    parser.add_argument("--scheduler", metavar="NAME", help="diffusers' class name")
    parser.add_argument("--eta", metavar="X", type=float, help="noise of the DDIM scheduler")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=DEFAULT_TIMEOUT_S, help="default: %(default)g"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        return _run(make_parser().parse_args(argv))
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)


def _run(arguments: argparse.Namespace) -> int:
    try:
        _audio_file.check_path(arguments.output)
        client = AudioLDM2Client(arguments.url, model_name=arguments.model, timeout_s=arguments.timeout)
    except (ValueError, OSError) as error:
        return _fail(error, EXIT_USAGE)
    try:
        with client:
            start = time.monotonic()
            result = _generate(client, arguments)
            elapsed_s = time.monotonic() - start
    except AudioLDM2Error as error:
        return _fail(error, _exit_status(error))
    if truncated := int(result.truncated_tokens.max()):
        print(f"audioldm2: the prompt is too long: its last {truncated} tokens had no effect", file=sys.stderr)
    try:
        _save(result, arguments.output)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: soundfile's, such as a full disk
        return _fail(f"can't write {str(arguments.output)!r}: {error}", EXIT_FAULT)
    print(f"seed {result.seed}, generated in {elapsed_s:.1f} s")
    return 0


def _generate(client: AudioLDM2Client, arguments: argparse.Namespace) -> GenerationResult:
    return client.generate(
        arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        audio_length_in_s=arguments.length,
        num_waveforms_per_prompt=arguments.candidates,
        seed=arguments.seed,
        scheduler=arguments.scheduler,
        eta=arguments.eta,
    )


def _save(result: GenerationResult, output: Path) -> None:
    """Write every waveform and say so, a line for each."""
    count, samples = result.audio.shape
    for index in range(count):
        path = output if count == 1 else output.with_stem(f"{output.stem}-{index + 1}")
        result.save(path, index)
        score = "" if count == 1 else f", CLAP score {result.clap_scores[index]:.3f}"
        print(f"{path}: {samples / result.sampling_rate:.2f} s at {result.sampling_rate} Hz{score}")


def _exit_status(error: AudioLDM2Error) -> int:
    if isinstance(error, InvalidRequestError):
        return EXIT_USAGE
    if isinstance(error, (ServerBusyError, ServerUnreachableError)):
        return EXIT_UNAVAILABLE
    return EXIT_DEADLINE if isinstance(error, DeadlineExceededError) else EXIT_FAULT


def _fail(reason: object, status: int) -> int:
    """Say why in one line; what a server adds below it, such as a traceback, is in its log."""
    print(f"audioldm2: {str(reason).strip().splitlines()[0]}", file=sys.stderr)
    return status


def _version() -> str:
    from audioldm2_client import __version__

    return __version__
