"""What nvidia-smi says."""

import contextlib
import subprocess

FACTS = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def smi() -> dict[str, str]:
    """Return what it says of the first GPU, by the names of its own; nothing where there is none."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={FACTS}", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return dict(zip(FACTS.split(","), map(str.strip, done.stdout.split(",")), strict=False))
    return {}
