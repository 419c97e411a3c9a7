"""The Prometheus that rules and dashboard are tested with: `python tests/helpers/prometheus.py FOLDER` puts it there.

It comes from Debian's package, with promtool. Which version that is, the machine's Debian decides: no older one stays
in its archive, so none is pinned here, and apt has verified the archive's signature. No root is wanted, and nothing is
installed outside of the folder.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

INSTALLED = Path(__file__).resolve().parents[2] / ".venv/prometheus"
"""Where `make` puts it."""
PROGRAMS = ("prometheus", "promtool")
PACKAGE = "prometheus"
TIMEOUT_S = 600


def install(folder: Path) -> None:
    """Put the programs into a folder, which is made anew.

    Raises:
        RuntimeError: they can't be had here; the message says why.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RuntimeError("it takes Debian's or Ubuntu's apt-get and dpkg-deb")
    with tempfile.TemporaryDirectory() as download:
        files = Path(download, "files")
        _run(["dpkg-deb", "-x", str(_download(Path(download))), str(files)])
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for program in PROGRAMS:
            shutil.copy(files / "usr/bin" / program, folder)


def find_program(name: str) -> Path | None:
    """Return one of PROGRAMS as it was installed here, or else the machine's own; None where there is neither."""
    found = (INSTALLED / name, shutil.which(name))
    return next((Path(program) for program in found if program and Path(program).exists()), None)


def _download(folder: Path) -> Path:
    """Fetch the package with the machine's lists of packages, or, where those are missing or old, with new ones."""
    try:
        _run(["apt-get", "download", PACKAGE], folder)
    except RuntimeError:
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        own = [
            *("-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"),
            *("-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=true"),
        ]
        _run(["apt-get", *own, "update"], folder)
        _run(["apt-get", *own, "download", PACKAGE], folder)
    return next(folder.glob("*.deb"))


def _run(command: list[str], folder: Path | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")


if __name__ == "__main__":
    try:
        install(Path(sys.argv[1]))
    except RuntimeError as error:
        sys.exit(f"no Prometheus: {error}")
