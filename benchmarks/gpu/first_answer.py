"""A start as a server's: a new process, from nothing to the first answers; says when each thing is there.

`python -m benchmarks.gpu.first_answer CASE CACHE`: the case in JSON, and the folder of the compile cache. Each line of
its output is a JSON array of the time (Unix, s) and of what has happened.
"""

import json
import sys
import time
from pathlib import Path

COMPILED_TIMEOUT_S = 600.0


def say(what: str) -> None:
    """Say what has happened."""
    print(json.dumps([time.time(), what]), flush=True)


def uses_compiled(sentences: list[str]) -> bool:
    """Say whether a graph was captured after something had been compiled, from what the server's log would have."""
    compiled = [number for number, sentence in enumerate(sentences) if sentence.startswith("compiled ")]
    return bool(compiled) and any(sentence.startswith("captured ") for sentence in sentences[compiled[0] :])


def main() -> None:
    """Start, answer, and go on until a shape is compiled and used."""
    say("the interpreter runs")
    from benchmarks.gpu.case import Case
    from benchmarks.gpu.loops import Ours, make_request

    say("PyTorch is imported")
    case = Case.from_json(sys.argv[1])
    with Ours(case, compile_cache=Path(sys.argv[2]), compiles_behind=True, report=say) as ours:
        say("it is ready")
        for answer in ("the first answer", "the second answer"):
            ours.run([make_request(case, guided=True)])
            say(answer)
        stop = time.monotonic() + COMPILED_TIMEOUT_S
        while ours.compiles and not uses_compiled(ours.sentences) and time.monotonic() < stop:
            time.sleep(0.1)
        ours.run([make_request(case, guided=True)])
        say("an answer of what is compiled")


if __name__ == "__main__":
    main()
