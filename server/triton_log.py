"""Read tritonserver's log: why it could not start, and which last lines a person should see."""

import json
import re
from pathlib import Path

TAIL_LINES = 40

# What tritonserver says wherever there is no NVIDIA driver. True, harmless, and alarming to read.
_NO_GPU_COMPLAINTS = re.compile(
    r"Unable to allocate pinned system memory|CudaDriverHelper has not been initialized|Failed to initialize NVML"
    r"|DCGM unable to start|CUDA driver version is insufficient for CUDA runtime version"
)
_NVIDIA_DRIVER = Path("/dev/nvidiactl")
_TABLE_ROW = re.compile(r"[+|]")

# E1122 18:14:39.247811 5016 model_lifecycle.cc:642] "failed to load 'vae' version 1: Internal: reason"
_ERROR = r'^E\S* .*?{source}\.cc:\d+\] "{message}"$'
_MODEL_FAILURES = re.compile(
    _ERROR.format(source=r"model_\w+", message=r"failed to load (?:model )?'([^']+)'(?: version \d+)?: (.*)"),
    re.MULTILINE,
)
_REPOSITORY_FAILURES = re.compile(_ERROR.format(source=r"model_repository_manager", message="(.*)"), re.MULTILINE)
# What the shell or the loader says in the place of the process that hosts a Python model.
_MODEL_PROCESS_FAILURES = re.compile(
    r"^(?:bash: line \d+: )?(.*/triton_python_backend_stub: .+)$|^(?:bash: line \d+: )(.+)$|^  what\(\):  (.+)$",
    re.MULTILINE,
)
_CONSEQUENCE = re.compile(r"which has no loaded version|contains models that are not available")
_OTHER_FAILURES = re.compile(
    r"""^\[libprotobuf\ ERROR\ [^\]]*\]\ (?P<config>.*)$
    |^(?P<option>.*(?:unrecognized\ option|Bad\ option|Invalid\ option\ value).*)$
    |^E\S*\ .*?main\.cc:\d+\]\ "?(?P<endpoint>failed\ to\ start\ .*?)"?$
    """,
    re.MULTILINE | re.VERBOSE,
)


def failure_reasons(log: str) -> list[str]:
    """Find out why tritonserver could not start, from its log.

    Returns:
        A sentence for each cause, without the causes' consequences; nothing if the log doesn't tell.
    """
    models = {match[1]: _first_line(match[2]) for match in _MODEL_FAILURES.finditer(log)}
    reasons = [f"Model '{name}' failed to load: {_sentence(reason)}" for name, reason in models.items()]
    repository = [_first_line(match[1]) for match in _REPOSITORY_FAILURES.finditer(log)]
    consequences = [message for message in repository if _CONSEQUENCE.search(message)]
    reasons += [_sentence(m) for m in repository if m not in consequences and not m.startswith("failed to load ")]
    reasons += [_sentence(match[match.lastgroup or 0].strip()) for match in _OTHER_FAILURES.finditer(log)]
    return reasons or [_sentence(message) for message in consequences]


def model_process_failure(log: str) -> str:
    """Return a sentence about a Python model whose process could not start, for which Triton would wait for ever."""
    match = _MODEL_PROCESS_FAILURES.search(log)
    return f"A Python model's process could not start: {_sentence(match[match.lastindex or 0])}" if match else ""


def tail(log: str, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a log, without tables and the complaints that every machine without a GPU makes."""
    shown = [line for line in without_gpu_complaints(log).splitlines() if line and not _TABLE_ROW.match(line)]
    return "\n".join(shown[-lines:])


def without_gpu_complaints(log: str) -> str:
    """Drop the lines about a missing NVIDIA driver, where there indeed is none."""
    if _NVIDIA_DRIVER.exists():
        return log
    return "".join(line for line in log.splitlines(keepends=True) if not _NO_GPU_COMPLAINTS.search(line))


def _first_line(escaped: str) -> str:
    """Undo the log's escapes and keep the first line: the rest is a Python traceback."""
    try:
        message = str(json.loads(f'"{escaped}"'))
    except ValueError:
        message = escaped
    return message.strip().partition("\n")[0]


def _sentence(reason: str) -> str:
    """End a reason with one full stop, and drop the wrapping of an exception that a Python model raised on purpose."""
    return re.sub(r"^Internal: (\w+\.)*TritonModelException: ", "", reason).rstrip(".") + "."
