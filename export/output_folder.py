"""The model repository that an export fills: looked at beforehand, and changed all at once or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from export.errors import OutputError
from export.model_names import STAGES, ModelNames

VERSION = "1"


def check_output(output: Path, names: ModelNames) -> None:
    """Raise OutputError unless this user can write `output` and what an export replaces in it; writes nothing."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output {output} is a file: it must be a folder, or not exist yet.")
    versions = [output / names.of(stage) / VERSION for stage in STAGES]
    for folder in (output, *versions):
        nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(
                f"--output {output}: this user can't write into {nearest}. Choose another folder, or change the "
                f"permissions of this one."
            )


@contextlib.contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """Make `output` and a folder for the new files, which is gone afterwards; so is `output`, if nothing came into it.

    The new files wait beside `output`, where putting them in is a rename, or in TMPDIR where this user can't write
    there. Inside of `output`, Triton would take even a hidden folder for a model.
    """
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    beside = output.resolve().parent
    try:
        place = beside if os.access(beside, os.W_OK | os.X_OK) else None
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=place) as folder:
            yield Path(folder)
    finally:
        with contextlib.suppress(OSError):  # something is in it
            for parent in made:
                parent.rmdir()


def install(staged: Path, output: Path, obsolete: Iterable[Path] = ()) -> None:
    """Move everything from `staged`, a repository, into `output`: whatever goes wrong, all of it or nothing.

    First the new files come beside their places, which takes time and room where TMPDIR is another file system; then
    they are renamed.

    Args:
        staged: Models with a config.pbtxt, if it is to be replaced, and version folders.
        output: The repository. What it has beside the new files stays.
        obsolete: Paths in `output` that go.
    """
    models = sorted(staged.iterdir())
    versions = [path for model in models for path in sorted(model.iterdir()) if path.is_dir()]
    files = [path for folder in (*models, *versions) for path in sorted(folder.iterdir()) if path not in versions]
    replaced = [output / path.relative_to(staged) for path in files]
    with contextlib.ExitStack() as undo:
        for folder in (*models, *versions):
            _make_folder(output / folder.relative_to(staged), undo)
        for path, place in zip(files, replaced, strict=True):
            new = _beside(place, "new")
            _remove(new)
            undo.callback(_remove, new)
            shutil.move(path, new)
        for place in (*obsolete, *replaced):
            _swap(place, undo)
        undo.pop_all()
    for place in (*obsolete, *replaced):
        _remove(_beside(place, "old"))


def _make_folder(folder: Path, undo: contextlib.ExitStack) -> None:
    if not folder.exists():
        folder.mkdir()
        undo.callback(folder.rmdir)


def _swap(place: Path, undo: contextlib.ExitStack) -> None:
    """Put what waits beside `place` there, if anything does, and what was there aside."""
    new, old = _beside(place, "new"), _beside(place, "old")
    _remove(old)
    undo.callback(_restore, place, is_new=not place.exists())
    if place.exists():
        place.rename(old)
    if new.exists():
        new.rename(place)


def _restore(place: Path, *, is_new: bool) -> None:
    old = _beside(place, "old")
    if old.exists():
        _remove(place)
        old.rename(place)
    elif is_new:
        _remove(place)


def _beside(place: Path, kind: str) -> Path:
    return place.with_name(f".{place.name}.{kind}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
