"""A damaged export is refused in one sentence, within seconds: file, what is wrong, and the command that repairs it."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from export.manifest import manifest_path
from export.model_names import ModelNames
from server import EmbeddedServer, ServerError
from server.artefacts import artefact_warnings
from server.checks import check_model_repository
from tests.helpers import damage
from tests.helpers import tiny_repository as tiny

VAE, GPT2 = "vae/1/model.onnx", "gpt2/1/model.onnx"
UNET = "unet/1/unet/diffusion_pytorch_model.safetensors"
TOKENIZER, GEOMETRY, MANIFEST = (f"tokenizer/1/{name}.json" for name in ("t5_tokenizer", "audio_geometry", "manifest"))
EXTRACTOR, CODE = "postprocess/1/preprocessor_config.json", "unet/1/unet_forward.py"
DIFFERS = r"isn't what was exported \(its SHA-256 differs\)"

DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "model.onnx truncated": (VAE, damage.truncate, rf"{VAE} has [\d,]+ bytes instead of [\d,]+"),
    "model.onnx empty": (VAE, damage.empty, rf"{VAE} has 0 bytes instead of [\d,]+"),
    "model.onnx missing": (VAE, damage.remove, f"{VAE} is missing"),
    "model.onnx with a flipped bit": (VAE, damage.flip, f"{VAE} {DIFFERS}"),
    "model.onnx with a byte too many": (VAE, damage.grow, rf"{VAE} has [\d,]+ bytes instead of [\d,]+"),
    "model.onnx of zeros": (VAE, damage.zero, f"{VAE} is damaged or isn't an ONNX model"),
    "model.onnx a folder": (VAE, damage.make_folder, f"{VAE} is not a regular file"),
    "model.onnx a pipe": (VAE, damage.make_pipe, f"{VAE} is not a regular file"),
    "model.onnx a link to nothing": (VAE, damage.dangle, f"{VAE} is a link to /nowhere/blobs/1234, which isn't there"),
    "model.onnx not fetched": (VAE, damage.make_pointer, rf"{VAE} has [\d,]+ bytes instead of [\d,]+"),
    "weights truncated": (UNET, damage.truncate, rf"{UNET} has [\d,]+ bytes instead of [\d,]+"),
    "weights missing": (UNET, damage.remove, f"{UNET} is missing"),
    "weights with a flipped bit": (UNET, damage.flip, f"{UNET} {DIFFERS}"),
    "weights of zeros": (UNET, damage.zero, rf"{UNET} is truncated or isn't a safetensors file \([\d,]+ bytes, .* 0\)"),
    "folder of weights missing": ("unet/1/unet", damage.remove, "unet/1/unet is missing"),
    "scheduler missing": ("unet/1/scheduler", damage.remove, "unet/1/scheduler is missing"),
    "tokenizer truncated": (TOKENIZER, damage.truncate, rf"{TOKENIZER} has [\d,]+ bytes instead of [\d,]+"),
    "tokenizer missing": (TOKENIZER, damage.remove, f"{TOKENIZER} is missing"),
    "tokenizer with a flipped bit": (TOKENIZER, damage.flip, f"{TOKENIZER} {DIFFERS}"),
    "sizes with a flipped bit": (
        "tokenizer/1/audio_geometry.json",
        damage.flip,
        f"tokenizer/1/audio_geometry.json {DIFFERS}",
    ),
    "feature extractor missing": (EXTRACTOR, damage.remove, f"{EXTRACTOR} is missing"),
    "code truncated": (
        "unet/1/step_table.py",
        damage.truncate,
        r"unet/1/step_table.py has [\d,]+ bytes instead of [\d,]+",
    ),
    "code missing": (CODE, damage.remove, f"{CODE} is missing"),
    "version folder missing": ("vae/1", damage.remove, "vae/1 is missing"),
    "stage missing": ("vae", damage.remove, "vae is missing"),
    "manifest empty": (MANIFEST, damage.empty, f"{MANIFEST} is damaged"),
    "manifest truncated": (MANIFEST, damage.truncate, f"{MANIFEST} is damaged"),
}

WITHOUT_MANIFEST: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "model.onnx truncated": (VAE, damage.truncate, rf"{VAE} is truncated: it has [\d,]+ bytes and needs [\d,]+"),
    "model.onnx empty": (VAE, damage.empty, f"{VAE} is empty"),
    "model.onnx missing": (VAE, damage.remove, f"{VAE} is missing"),
    "model.onnx a folder": (VAE, damage.make_folder, f"{VAE} is not a regular file"),
    "model.onnx a pipe": (VAE, damage.make_pipe, f"{VAE} is not a regular file"),
    "model.onnx not fetched": (VAE, damage.make_pointer, rf"{VAE} is a pointer of Git LFS"),
    "weights truncated": (UNET, damage.truncate, rf"{UNET} has [\d,]+ bytes, and its header says [\d,]+"),
    "weights empty": (UNET, damage.empty, f"{UNET} is empty"),
    "weights missing": (UNET, damage.remove, f"{UNET} is missing"),
    "tokenizer truncated": (TOKENIZER, damage.truncate, f"{TOKENIZER} is damaged: it isn't JSON"),
    "tokenizer missing": (TOKENIZER, damage.remove, f"{TOKENIZER} is missing"),
    "stage missing": ("jobs", damage.remove, "jobs is missing"),
    "tokenizer's stage missing": ("tokenizer", damage.remove, "tokenizer is missing"),
}


@pytest.fixture
def repository(exported_repository, tmp_path) -> Path:
    """A copy of the export that may be damaged."""
    return damage.linked_copy(exported_repository, tmp_path / "models")


def refusal(repository: Path) -> str:
    """Start a server, which has to refuse in one sentence within 5 s."""
    started = time.monotonic()
    with pytest.raises(ServerError) as caught:
        EmbeddedServer(repository).start()
    assert time.monotonic() - started < 5
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert caught.value.log_tail == "", "Triton was started"
    return sentence


@pytest.mark.parametrize(("place", "harm", "wrong"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_refused_with_the_file_and_the_command_that_was_recorded(
    repository, demo_checkpoint, place, harm, wrong
):
    harm(repository / place)
    sentence = refusal(repository)
    assert re.search(rf" is (damaged|incomplete): {wrong}; run `", sentence), sentence
    target = "" if place == MANIFEST else " --target cpu"  # the manifest knows for what it was exported
    assert f"run `python -m export --checkpoint {demo_checkpoint} --output {repository}{target}`" in sentence


@pytest.mark.parametrize(("place", "harm", "wrong"), WITHOUT_MANIFEST.values(), ids=WITHOUT_MANIFEST)
def test_damage_is_seen_without_a_manifest_too(repository, demo_checkpoint, place, harm, wrong):
    manifest_path(repository, ModelNames()).unlink()
    harm(repository / place)
    sentence = refusal(repository)
    assert re.search(rf" is (damaged|incomplete): {wrong}.*; run `", sentence), sentence
    known = "DIR_OR_HUB_ID" if place == "tokenizer" else demo_checkpoint
    assert f"run `python -m export --checkpoint {known} --output {repository}`" in sentence


def test_files_of_another_export_are_refused(repository):
    for one, other in ((VAE, GPT2), (TOKENIZER, TOKENIZER.replace("t5", "clap"))):
        (repository / one).rename(repository / "aside")
        (repository / other).rename(repository / one)
        (repository / "aside").rename(repository / other)
    sentence = refusal(repository)
    assert all(f"{path} has " in sentence for path in (VAE, GPT2, TOKENIZER, TOKENIZER.replace("t5", "clap")))


@pytest.mark.parametrize("content", [None, b'{"format": 99}'], ids=["no manifest", "a newer manifest"])
def test_an_export_without_a_manifest_of_today_is_served_with_a_warning(repository, demo_checkpoint, content):
    path = manifest_path(repository, ModelNames())
    path.unlink() if content is None else damage.replace(path, content)
    check_model_repository(repository)
    (sentence,) = artefact_warnings(repository)
    assert sentence.startswith(f"audioldm2 in {repository} has ")
    assert sentence.endswith(f"run `python -m export --checkpoint {demo_checkpoint} --output {repository}`.")


def test_a_whole_export_is_served_without_a_warning(repository):
    (repository / "unet" / "1" / "notes.txt").write_text("what lies beside the export is no error")
    config = repository / "unet" / "config.pbtxt"
    damage.replace(config, config.read_bytes() + b"# tuned\n")
    check_model_repository(repository)
    assert artefact_warnings(repository) == []


def test_other_models_and_places_have_no_warning(tmp_path):
    tiny.add_double(tmp_path)
    assert artefact_warnings(tmp_path) == []
    assert artefact_warnings(tmp_path / "nowhere") == []


def test_an_ensemble_without_one_of_its_steps_is_refused(tmp_path):
    floats = tiny.tensors("TYPE_FP32 dims: [ 3 ]", "TYPE_FP32 dims: [ 3 ]")
    tiny.add_double(tmp_path)
    tiny.add_chain(tmp_path, "chain", floats, [("double", "x=x", "y=mid"), ("gone", "x=mid", "y=y")])
    assert f"The model repository {tmp_path} is incomplete: gone is missing" in refusal(tmp_path)
    config = tmp_path / "chain" / "config.pbtxt"
    config.write_text(config.read_text().replace('"gone"', '"double"') + '# model_name: "commented out"\n')
    check_model_repository(tmp_path)


@pytest.mark.parametrize("content", [b"", b" \n"])
def test_an_empty_configuration_is_refused(repository, content):
    damage.replace(repository / "gpt2" / "config.pbtxt", content)
    assert f"{repository}/gpt2/config.pbtxt is empty: take the one of" in refusal(repository)


def test_a_configuration_of_other_bytes_ends_in_no_traceback(tmp_path):
    config = tiny.add_double(tmp_path) / "config.pbtxt"
    config.write_bytes(config.read_bytes() + b"# \xff\xfe\n")
    check_model_repository(tmp_path)


def start(repository: Path, *prefix: str) -> tuple[str, float]:
    """Run the command, which has to fail, and return what it says and the seconds it took."""
    started = time.monotonic()
    command = [*prefix, sys.executable, "-B", "-m", "server", "--model-repository", str(repository)]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr, time.monotonic() - started


def test_the_command_refuses_a_flipped_bit_within_five_seconds(repository):
    damage.flip(repository / VAE)
    said, seconds = start(repository)
    assert re.match(rf"error: The model repository {repository} is damaged: {VAE} {DIFFERS}; run `python -m ", said)
    assert seconds < 5


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
def test_what_may_not_be_read_is_told_apart_from_damage(repository):
    content = (repository / VAE).read_bytes()
    damage.replace(repository / VAE, content)  # not the link's rights
    (repository / VAE).chmod(0)
    drop = ("--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")
    said, _ = start(repository, *(["setpriv", *drop] if os.getuid() == 0 else []))
    assert f"can't be read (Permission denied: {repository / VAE}): give this user" in said
