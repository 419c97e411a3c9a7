"""The options of the command line."""

import argparse
from pathlib import Path
from typing import Any

from audioldm2_client._exit_status import EXPLANATION
from audioldm2_client._options import OPTIONS
from audioldm2_client._server_options import add_server_options

DEFAULT_CONCURRENCY = 4
DEFAULT_RETRY_FOR_S = 300.0

_EPILOG = f"""\
examples:
  audioldm2 "a dog barking in the rain" -o dog.wav --length 5 --seed 7
  audioldm2 "a church bell" -o bell.flac --candidates 4 --json
  audioldm2 --prompts prompts.txt --output-dir sounds --concurrency 8
  audioldm2 "waves" -o waves.wav --url https://gpu.example:443 --ca-file ca.pem
  audioldm2 ui

The last one serves a page for the browser, with options of its own: audioldm2 ui --help.

The server's defaults hold for every option that isn't given. Environment: AUDIOLDM2_URL sets the default of --url,
AUDIOLDM2_API_KEY that of --api-key. TRACEPARENT and TRACESTATE, a W3C trace context, are passed on to the server.

{EXPLANATION}
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
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to hear")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help=".wav or .flac; FILE-1, FILE-2, ... for several candidates"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    _add_generation(parser.add_argument_group("generation"))
    _add_output(parser.add_argument_group("output"))
    _add_batch(parser.add_argument_group("many prompts"))
    add_server_options(parser.add_argument_group("server"))
    return parser


def parse(parser: argparse.ArgumentParser, argv: Any) -> argparse.Namespace:
    """Parse the command line; options that exclude each other are bad usage."""
    arguments = parser.parse_args(argv)
    if arguments.prompts is None:
        wanted = {"PROMPT": arguments.prompt, "-o": arguments.output}
        excluded = {name: getattr(arguments, _attribute(name)) for name in _BATCH_ONLY}
        mode = "without --prompts"
    else:
        wanted = {"--output-dir": arguments.output_dir}
        excluded = {"PROMPT": arguments.prompt, "-o": arguments.output}
        excluded |= {"--spectrogram": arguments.spectrogram, "--play": arguments.play or None}
        excluded |= {"--request-id": arguments.request_id}
        mode = "with --prompts"
    for name, value in wanted.items():
        if value is None:
            parser.error(f"{name} is needed {mode}")
    for name, value in excluded.items():
        if value is not None:
            parser.error(f"{name} can't be used {mode}")
    return arguments


def _add_generation(group: Any) -> None:
    for name, option in OPTIONS.items():
        words = option.meaning if option.one_per_prompt else option.help
        group.add_argument(option.flag, dest=name, metavar=option.metavar, type=option.python_type, help=words)


def _add_output(group: Any) -> None:
    group.add_argument(
        "--request-id",
        metavar="ID",
        help="the request's id, for the server's log and for `jobs`; default: a random one",
    )
    group.add_argument("--json", action="store_true", help="print a line of JSON for each result")
    group.add_argument("--spectrogram", metavar="FILE", type=Path, help=".png of the (best) waveform; needs Pillow")
    group.add_argument("--play", action="store_true", help="play the (best) waveform: aplay, paplay, ffplay or afplay")
    group.add_argument("--no-progress", action="store_true", help="no progress bar, also on a terminal")


_BATCH_ONLY = ("--output-dir", "--format", "--concurrency", "--retry-for")


def _attribute(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _add_batch(group: Any) -> None:
    group.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help='a prompt on each line, or a JSON object such as {"prompt": "a dog", "seed": 7, "name": "dog"}',
    )
    group.add_argument(
        "--output-dir", metavar="DIR", type=Path, help="created if missing; results that are already there are skipped"
    )
    group.add_argument("--format", choices=("wav", "flac"), help="of the files in DIR; default: wav")
    group.add_argument(
        "--concurrency", metavar="N", type=int, help=f"requests at the same time; default: {DEFAULT_CONCURRENCY}"
    )
    group.add_argument(
        "--retry-for",
        metavar="SECONDS",
        type=float,
        help=f"how long to wait for a server that is busy or unreachable; default: {DEFAULT_RETRY_FOR_S:g}",
    )


def _version() -> str:
    from audioldm2_client import __version__

    return __version__
