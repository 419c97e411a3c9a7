"""The manifest: what the export wrote, and the command that says whether it still is."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from export import __main__ as command
from export import repository as export_repository
from export import verify
from export.inspection import LOADED_FILES, MAX_NAMED_FILES, inspect
from export.manifest import ExportOptions, FileRecord, manifest_path, read_manifest
from export.model_names import FILE_STAGES, STAGES, ModelNames, ensemble_of
from tests.helpers import damage
from tests.helpers.damage import linked_copy

ROOT = Path(__file__).parents[2]
OTHER_USER = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups")
NAMES, MUSIC = ModelNames(), ModelNames("audioldm2_music")


@pytest.fixture
def repository(exported_repository, tmp_path) -> Path:
    """A copy of the export that may be damaged."""
    return linked_copy(exported_repository, tmp_path / "models")


@pytest.fixture
def quick_export(monkeypatch) -> None:
    """Export the stages that need no conversion alone."""
    monkeypatch.setattr(export_repository, "STAGES", FILE_STAGES)
    monkeypatch.setattr(export_repository, "ONNX_STAGES", {})


def export(checkpoint: Path, output: Path, *more: str) -> None:
    assert command.main(["--checkpoint", str(checkpoint), "--output", str(output), *more]) == 0


def verified(repository: Path, capsys, *more: str) -> tuple[int, str]:
    """Return exit code and output of the command, which writes to one of both streams."""
    capsys.readouterr()
    code = verify.main(["--output", str(repository), *more])
    out, err = capsys.readouterr()
    assert bool(err) == (code != 0)
    assert bool(out) == (code == 0)
    return code, out + err


def add_twin(repository: Path, names: ModelNames) -> None:
    """Add the same files as another ensemble, as `--name` does."""
    for stage in (*STAGES, "jobs"):
        linked_copy(repository / stage, repository / names.of(stage))
    path = manifest_path(repository, names)
    content = json.loads(path.read_text())
    content["export"]["name"] = names.ensemble
    files = {
        names.of(file.split("/")[0]) + file[file.index("/") :]: record for file, record in content["files"].items()
    }
    damage.replace(path, json.dumps(content | {"files": files}).encode())


def test_the_manifest_lists_all_that_was_exported_but_the_configurations(exported_repository, demo_checkpoint):
    manifest = read_manifest(manifest_path(exported_repository, NAMES))
    assert manifest.options == ExportOptions(str(demo_checkpoint), target="cpu")
    assert manifest.files == {
        path.relative_to(exported_repository).as_posix(): FileRecord(
            path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in exported_repository.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name not in ("config.pbtxt", "manifest.json")
    }


def test_what_the_stages_load_without_a_manifest_is_what_is_exported(exported_repository):
    files = read_manifest(manifest_path(exported_repository, NAMES)).files
    weights = {path for path in files if not path.endswith((".py", ".onnx", "checkpoint.json"))}
    loaded = {
        (path.parent / name).relative_to(exported_repository).as_posix()
        for module, names in LOADED_FILES.items()
        for path in exported_repository.glob(f"*/1/{module}")
        for name in names
    }
    assert loaded == weights


@pytest.mark.usefixtures("quick_export")
def test_each_export_renews_the_manifest_of_its_ensemble_alone(demo_checkpoint, tmp_path, capsys):
    output = tmp_path / "größer 犬"
    export(demo_checkpoint, output)
    export(demo_checkpoint, output, "--name", MUSIC.ensemble, "--precision", "bf16")
    before = read_manifest(manifest_path(output, MUSIC))
    assert before.options == ExportOptions(str(demo_checkpoint), MUSIC.ensemble, "bf16", target="cpu")
    assert {path.split("/")[0] for path in before.files} == {MUSIC.of(model) for model in (*FILE_STAGES, "jobs")}
    export(demo_checkpoint, output, "--precision", "fp16")
    assert read_manifest(manifest_path(output, NAMES)).options.precision == "fp16"
    assert read_manifest(manifest_path(output, MUSIC)) == before
    code, said = verified(output, capsys)
    assert code == 0, said
    assert said.startswith(f"{output}: audioldm2, audioldm2_music as exported (")


@pytest.mark.usefixtures("quick_export")
def test_committed_files_belong_to_git_and_not_to_the_manifest(demo_checkpoint, tmp_path, monkeypatch, capsys):
    output = tmp_path / "model_repository"
    shutil.copytree(ROOT / "model_repository", output, ignore=damage_ignored)
    monkeypatch.setattr(export_repository, "COMMITTED_REPOSITORY", output)
    export(demo_checkpoint, output)
    files = read_manifest(manifest_path(output, NAMES)).files
    assert {Path(path).name for path in files} == {
        "checkpoint.json",
        *(Path(name).name for names in LOADED_FILES.values() for name in names),
    }
    (output / "unet" / "1" / "model.py").write_text("# somebody works on this\n")
    assert verified(output, capsys)[0] == 0


def damage_ignored(folder: str, names: list[str]) -> list[str]:
    """What isn't committed, for `shutil.copytree`."""
    return [name for name in names if Path(folder).name == "1" and not name.endswith(".py")]


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="needs a clone")
def test_git_ignores_the_manifest():
    path = manifest_path(ROOT / "model_repository", NAMES)
    assert subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT, timeout=20).returncode == 0  # noqa: S607


@pytest.mark.parametrize(
    "options",
    [
        ExportOptions("cvssp/audioldm2", target="cpu"),
        ExportOptions("/weights/it's größer", "audioldm2_music", "bf16", ("text_encoder", "clap_audio"), "gpu"),
    ],
)
def test_the_recorded_command_is_the_one_that_was_run(options):
    words = shlex.split(options.command(Path("/models here")))
    assert words[:3] == ["python", "-m", "export"]
    parsed = command._parser().parse_args(words[3:])
    stages = tuple(parsed.fp16_stages or ())
    assert ExportOptions(parsed.checkpoint, parsed.name, parsed.precision, stages, parsed.target) == options
    assert parsed.output == Path("/models here")


def test_a_whole_repository_is_verified(repository, capsys):
    (repository / "vae" / "1" / "notes.txt").write_text("what lies beside it is no error")
    damage.replace(repository / "unet" / "config.pbtxt", b"# tuned")
    (repository / "unet" / "1" / "__pycache__").mkdir()
    for more in ([], ["--quick"]):
        code, said = verified(repository, capsys, *more)
        assert code == 0
        assert said.startswith(f"{repository}: audioldm2 as exported (")


def test_large_files_are_summed_on_demand_alone(repository, monkeypatch, capsys):
    monkeypatch.setattr(verify, "QUICK_SUM_BYTES", 1_000_000)
    damage.flip(repository / "vae" / "1" / "model.onnx")
    assert verified(repository, capsys, "--quick")[0] == 0
    code, said = verified(repository, capsys)
    assert code == 1
    assert "vae/1/model.onnx isn't what was exported (its SHA-256 differs); run `python -m export" in said
    damage.flip(repository / "tokenizer" / "1" / "t5_tokenizer.json")
    assert "t5_tokenizer.json isn't what was exported" in verified(repository, capsys, "--quick")[1]


def test_each_damaged_ensemble_is_named_with_its_own_command(repository, demo_checkpoint, capsys):
    add_twin(repository, MUSIC)
    assert verified(repository, capsys)[0] == 0
    damage.remove(repository / "audioldm2_music_vae" / "1" / "model.onnx")
    base = f"python -m export --checkpoint {demo_checkpoint} --output {repository}"
    code, said = verified(repository, capsys)
    assert code == 1
    assert said == (
        f"verify: The model repository {repository} is incomplete: audioldm2_music_vae/1/model.onnx is missing; run "
        f"`{base} --name audioldm2_music --target cpu`, or copy it again from where it was exported.\n"
    )
    damage.truncate(repository / "vae" / "1" / "model.onnx")
    first, second = verified(repository, capsys)[1].splitlines()
    assert "damaged: vae/1/model.onnx has " in first
    assert f"run `{base} --target cpu`, or" in first
    assert f"run `{base} --name audioldm2_music --target cpu`, or" in second


def test_a_long_list_of_files_is_shortened(repository, capsys):
    modules = list((repository / "unet" / "1").glob("*.py"))
    for path in modules:
        damage.empty(path)
    _, said = verified(repository, capsys)
    assert said.count("\n") == 1
    assert said.count(" has 0 bytes instead of ") == MAX_NAMED_FILES
    assert f" and {len(modules) - MAX_NAMED_FILES} more; run `" in said


MANIFESTS = {
    "empty": b"",
    "half": b'{"format": 1, "export": {"checkpoint": "x", "na',
    "binary": bytes(range(256)),
    "zeros": bytes(5000),
    "a list": b"[]",
    "no files": b'{"format": 1, "export": {"checkpoint": "x", "name": "a", "precision": "fp32", "fp16_stages": []}}',
    "no format": b'{"files": {}}',
    "nested": b"[" * 100_000,
    "another's": b'{"name": "app", "format": "1"}',
    "large": b" " * 5_000_000,
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_a_damaged_manifest_is_named_and_the_record_beside_it_tells_the_command(
    repository, demo_checkpoint, content, capsys
):
    damage.replace(manifest_path(repository, NAMES), content)
    code, said = verified(repository, capsys)
    assert code == 1
    assert said.startswith(f"verify: The model repository {repository} is damaged: tokenizer/1/manifest.json is ")
    assert f"; run `python -m export --checkpoint {demo_checkpoint} --output {repository}`." in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "unet/../../x", "a\0b"])
def test_a_manifest_names_no_file_outside_of_the_repository(repository, path, capsys):
    place = manifest_path(repository, NAMES)
    content = json.loads(place.read_text())
    content["files"] = {path: {"size": 1, "sha256": ""}}
    damage.replace(place, json.dumps(content).encode())
    assert "tokenizer/1/manifest.json is damaged" in verified(repository, capsys)[1]


def test_a_manifest_of_another_ensemble_is_told(repository, capsys):
    add_twin(repository, MUSIC)
    damage.replace(manifest_path(repository, MUSIC), manifest_path(repository, NAMES).read_bytes())
    said = verified(repository, capsys)[1]
    assert "audioldm2_music_tokenizer/1/manifest.json is that of audioldm2; run `" in said
    assert f"--output {repository} --name audioldm2_music`." in said


def test_a_manifest_that_is_a_folder_or_a_pipe_is_told(repository, capsys):
    for make in (damage.make_folder, damage.make_pipe):
        damage.remove(manifest_path(repository, NAMES))
        manifest_path(repository, NAMES).touch()
        make(manifest_path(repository, NAMES))
        assert "tokenizer/1/manifest.json is not a regular file" in verified(repository, capsys)[1]


def test_without_a_manifest_nothing_is_verified_and_it_is_said(repository, demo_checkpoint, capsys):
    damage.remove(manifest_path(repository, NAMES))
    code, said = verified(repository, capsys)
    assert code == 1
    assert said.startswith(f"verify: audioldm2 in {repository} has no manifest (an older version exported it), so that")
    assert f"run `python -m export --checkpoint {demo_checkpoint} --output {repository}`.\n" in said


def test_a_manifest_of_a_newer_version_is_no_damage(repository, capsys):
    damage.replace(manifest_path(repository, NAMES), b'{"format": 2, "chunks": []}')
    assert inspect(repository).damages == {}
    code, said = verified(repository, capsys)
    assert code == 1
    assert "has a manifest of a newer version" in said


def test_a_folder_without_an_export_is_not_verified(tmp_path, capsys):
    assert verified(tmp_path, capsys) == (1, f"verify: {tmp_path} holds no export: `python -m export` writes one.\n")
    code, said = verified(tmp_path / "nowhere", capsys)
    assert code == 1
    assert said.startswith(f"verify: There is no model repository at {tmp_path / 'nowhere'}: ")


def test_models_of_others_have_no_manifest_and_no_warning(tmp_path):
    for name in ("tokenizer", "their_tokenizer", "mytokenizer", "-odd-_tokenizer", "_unet", "jobs_unet"):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / "model.py").touch()
    (tmp_path / "mytokenizer" / "1" / "manifest.json").write_text("{}")
    inspection = inspect(tmp_path)
    assert (inspection.damages, inspection.unverifiable) == ({}, {})
    assert {ensemble_of(name) for name in ("-odd-_unet", "_unet", "jobs_unet", "unet", "x")} == {"audioldm2"}
    assert ensemble_of("audioldm2_music_text_encoder") == "audioldm2_music"


def test_the_command_needs_nothing_but_the_standard_library(repository):
    """It runs in containers, where the project's environment isn't."""
    damage.truncate(repository / "vae" / "1" / "model.onnx")
    finished = subprocess.run(
        [sys.executable, "-S", "-B", "-m", "export.verify", "--output", str(repository)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 1
    assert finished.stderr.startswith("verify: The model repository ")


@pytest.fixture
def reachable_copy(exported_repository) -> Iterator[Path]:
    """A copy that other users can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="models-") as name:
        Path(name).chmod(0o755)
        yield Path(shutil.copytree(exported_repository, Path(name) / "models"))


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root, and setpriv")
@pytest.mark.parametrize("unreadable", ["vae/1/model.onnx", "tokenizer/1/manifest.json", "unet/1/unet", ""])
def test_what_may_not_be_read_is_told(reachable_copy, unreadable):
    (reachable_copy / unreadable).chmod(0)
    finished = subprocess.run(
        [*OTHER_USER, sys.executable, "-B", "-m", "export.verify", "--output", str(reachable_copy)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert finished.returncode == 1
    assert f"{reachable_copy / unreadable}" in finished.stderr
    assert finished.stderr.endswith("can't be read: Permission denied.\n")
    assert finished.stderr.count("\n") == 1


def test_a_read_only_repository_of_links_is_verified(repository, tmp_path, capsys):
    linked = tmp_path / "linked"
    linked.mkdir()
    for model in repository.iterdir():
        (linked / model.name).symlink_to(model)
    for path in list(repository.rglob("*.onnx")):  # as in a cache of content by hash
        blob = tmp_path / f"blob-{path.parts[-3]}"
        path.rename(blob)
        path.symlink_to(blob)
    folders = [repository, linked, *(path for path in repository.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        assert verified(linked, capsys)[0] == 0
    finally:
        for path in folders:
            path.chmod(0o755)
