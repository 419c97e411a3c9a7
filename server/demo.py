"""What `make demo` runs: an embedded server, one generation over gRPC, one WAV file."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from audioldm2_client import AudioLDM2Client, AudioLDM2Error

from server.embedded import EmbeddedServer
from server.errors import ServerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate one file and return the exit code: 0, or 1 with a sentence on stderr, or 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        _generate(options.model_repository, options.prompt, options.output)
    except (ServerError, AudioLDM2Error, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        print(getattr(error, "log_tail", ""), file=sys.stderr, end="")
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


def _generate(model_repository: Path, prompt: str, output: Path) -> None:
    with EmbeddedServer(model_repository) as server:
        print(f"Triton serves {model_repository} at grpc://{server.grpc_url}")
        with AudioLDM2Client(server.grpc_url) as client:
            started = time.monotonic()
            result = client.generate(prompt)
            seconds = time.monotonic() - started
        result.save(output)
    length = result.audio.shape[1] / result.sampling_rate
    print(f"{output}: {length:.2f} s at {result.sampling_rate} Hz in {seconds:.1f} s, seed {result.seed}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server.demo", description=__doc__)
    parser.add_argument("prompt", help="what to hear")
    parser.add_argument("--model-repository", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".wav or .flac")
    return parser


if __name__ == "__main__":
    sys.exit(main())
