"""What the machine lacks, from a folder of wheels: a private environment over the present one.

Such an environment is a Python of its own with a folder of packages that go before the machine's. Triton starts the
Python models in it too; a variable such as PYTHONPATH wouldn't reach them.
"""

import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FIRST_PART = ".part-00"


def join_parts(folder: Path, output: Path) -> list[Path]:
    """Return all wheels of `folder`; those that are there as `NAME.whl.part-00`, `-01`, ... are joined in `output`.

    Raises:
        FileNotFoundError: A part in between is missing.
    """
    wheels = sorted(folder.glob("*.whl"))
    for first in sorted(folder.glob(f"*.whl{FIRST_PART}")):
        name = first.name.removesuffix(FIRST_PART)
        parts = sorted(folder.glob(f"{name}.part-*"))
        for number, part in enumerate(parts):
            if part.name != f"{name}.part-{number:02}":
                raise FileNotFoundError(f"{folder}: {name}.part-{number:02} is missing; the next one is {part.name}.")
        with (output / name).open("wb") as joined:
            for part in parts:
                with part.open("rb") as opened:
                    shutil.copyfileobj(opened, joined)
        wheels.append(output / name)
    return wheels


def make_environment(folder: Path, wheels: Sequence[Path]) -> tuple[Path, list[str]]:
    """Make an environment with some wheels over the present one; their dependencies must be there or among them.

    Args:
        folder: Of the new environment; it must not exist.
        wheels: They are installed without a package index.

    Returns:
        Its Python, and a sentence for each wheel that could not be installed.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    below = [path for path in (*site.getsitepackages(), sysconfig.get_path("purelib")) if Path(path).is_dir()]
    lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(below)]
    (packages / "below.pth").write_text("\n".join([*lines, str(ROOT / "client" / "src")]) + "\n")
    if not wheels or _install(wheels, packages) is None:
        return folder / "bin" / "python3", []
    failures = {wheel.name: _install([wheel], packages) for wheel in wheels}  # one alone keeps none of the others away
    return folder / "bin" / "python3", [f"{name}: {reason}" for name, reason in failures.items() if reason]


def _install(wheels: Sequence[Path], packages: Path) -> str | None:
    """Return None once they are installed, or the reason why not."""
    folders = [argument for folder in {wheel.parent for wheel in wheels} for argument in ("--find-links", str(folder))]
    names = ["==".join(wheel.name.split("-")[:2]) for wheel in wheels]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(packages), *folders, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]
