"""The manifest of an exported ensemble: the files that the export wrote, with sizes and SHA-256, and its options.

It lies in the version folder of the ensemble's tokenizer, beside `checkpoint.json`. Like the modules that check
repositories against it (`export/inspection.py`, `export/weight_headers.py`), this one needs only the standard library.
"""

import hashlib
import json
import shlex
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from export.model_names import ENSEMBLE, ModelNames
from export.output_folder import VERSION

MANIFEST = "manifest.json"

FORMAT = 1
"""Goes up when code of today could misread what is written."""

CONFIGURATION = "config.pbtxt"
"""In no manifest: people tune it after the export."""

MAX_MANIFEST_BYTES = 4_000_000

UNKNOWN_CHECKPOINT = "DIR_OR_HUB_ID"


class ManifestError(Exception):
    """A manifest is damaged; the text completes "manifest.json ..."."""


class NewerManifestError(Exception):
    """A manifest was written by a newer version of the export, and can't be used here."""


@dataclass(frozen=True)
class ExportOptions:
    """With which options an ensemble was exported; what `python -m export` calls them.

    Attributes:
        checkpoint: A hub id, or the absolute path of a folder.
        name: Of the ensemble.
        precision: Of the UNet's weights.
        fp16_stages: ONNX stages in float16.
        target: For what, one of TARGETS; empty where an older version didn't record it.
    """

    checkpoint: str = UNKNOWN_CHECKPOINT
    name: str = ENSEMBLE
    precision: str = "fp32"
    fp16_stages: tuple[str, ...] = ()
    target: str = ""

    def command(self, output: Path) -> str:
        """Return the command that exports the same again into `output`, as a shell takes it."""
        words = ["python", "-m", "export", "--checkpoint", self.checkpoint, "--output", str(output)]
        if self.name != ENSEMBLE:
            words += ["--name", self.name]
        if self.target:
            words += ["--target", self.target]
        if self.precision != "fp32":
            words += ["--precision", self.precision]
        if self.fp16_stages:
            words += ["--fp16-stages", *self.fp16_stages]
        return shlex.join(words)


@dataclass(frozen=True)
class FileRecord:
    """A file as the export wrote it: its size in bytes, and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What the export of one ensemble wrote.

    Attributes:
        options: Of the export.
        files: By path, relative to the model repository, with `/`.
    """

    options: ExportOptions
    files: Mapping[str, FileRecord]


def manifest_path(repository: Path, names: ModelNames) -> Path:
    """Return where the manifest of an ensemble is."""
    return repository / names.of("tokenizer") / VERSION / MANIFEST


def write_manifest(repository: Path, options: ExportOptions) -> None:
    """Write the manifest of an ensemble, for all that is in `repository` but the configurations.

    Args:
        repository: The files of this ensemble and nothing else, as an export has just written them.
        options: Of that export.
    """
    path = manifest_path(repository, ModelNames(options.name))
    files = {
        file.relative_to(repository).as_posix(): asdict(FileRecord(file.stat().st_size, sha256_of(file)))
        for file in sorted(repository.rglob("*"))
        if file.is_file() and file.name != CONFIGURATION and file != path
    }
    content = {"format": FORMAT, "export": asdict(options), "files": files}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Read the manifest at `path`.

    Raises:
        ManifestError: It is damaged, or no manifest.
        NewerManifestError: Its format is a later one.
        OSError: It isn't there, or can't be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ManifestError("is not a regular file")
    if status.st_size > MAX_MANIFEST_BYTES:
        raise ManifestError("is too large for a manifest")
    try:
        content = json.loads(path.read_bytes())
        newer = content["format"] > FORMAT
        if not newer:
            return Manifest(_options(content["export"]), _files(content["files"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ManifestError("is damaged") from error
    raise NewerManifestError


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _options(values: Mapping[str, Any]) -> ExportOptions:
    """Raise ValueError, TypeError or KeyError where `values` aren't what `write_manifest` writes."""
    checkpoint, name, precision = (_text(values[key]) for key in ("checkpoint", "name", "precision"))
    stages = tuple(_text(stage) for stage in values["fp16_stages"])
    return ExportOptions(checkpoint, ModelNames(name).ensemble, precision, stages, _text(values.get("target", "")))


def _files(values: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Raise ValueError, TypeError or KeyError where `values` aren't what `write_manifest` writes."""
    files = {}
    for path, record in values.items():
        size, digest = record["size"], _text(record["sha256"])
        if not isinstance(size, int) or PurePosixPath(path).is_absolute() or ".." in path.split("/") or "\0" in path:
            raise ValueError(path)
        files[path] = FileRecord(size, digest)
    return files


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value
