"""Checkpoints in every form that the hub has, and a sentence for what isn't one, before anything is loaded."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
import sentencepiece
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import export.checkpoint
from export import __main__ as command
from export.checkpoint import Checkpoint, CheckpointError
from export.demo_text import SENTENCES

TRANSFORMERS_MODELS = ("text_encoder", "text_encoder_2", "language_model", "vocoder")
MODELS = (*TRANSFORMERS_MODELS, "projection_model", "unet", "vae")
SAMPLE = ("text_encoder_2", "language_model", "projection_model", "vae")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def link_weights(source: str, target: str) -> None:
    """Copy, but only link the large files, which the tests replace and never write into."""
    (os.link if source.endswith(".safetensors") else shutil.copy)(source, target)


@pytest.fixture
def copied_checkpoint(demo_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(demo_checkpoint, tmp_path / "checkpoint", copy_function=link_weights))


@pytest.fixture(scope="module")
def original_weights(demo_checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    checkpoint = Checkpoint(demo_checkpoint)
    return {component: checkpoint.load(component).state_dict() for component in MODELS}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights_file(checkpoint: Path, component: str) -> Path:
    (path,) = (checkpoint / component).glob("*.safetensors")
    return path


def take_weights(checkpoint: Path, component: str) -> tuple[dict[str, torch.Tensor], Path]:
    """Remove a model's weights and return them, with the path that they would have as a .bin file."""
    path = weights_file(checkpoint, component)
    weights = load_file(path)
    path.unlink()
    stem = "pytorch_model" if component in TRANSFORMERS_MODELS else "diffusion_pytorch_model"
    return weights, path.with_name(f"{stem}.bin")


def save_safetensors(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file(weights, path, metadata={"format": "pt"})


def save_shards(weights: dict[str, torch.Tensor], path: Path, save: Callable, variant: str = "") -> None:
    names = sorted(weights)
    places = {}
    for number, shard in enumerate((names[::2], names[1::2]), start=1):
        file = f"{path.stem}{variant}-0000{number}-of-00002{path.suffix}"
        save({name: weights[name] for name in shard}, path.with_name(file))
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    path.with_name(f"{path.name}.index{variant}.json").write_text(json.dumps(index))


def halves(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}


def as_bin(checkpoint: Path, component: str) -> None:
    weights, path = take_weights(checkpoint, component)
    torch.save(weights, path)


def as_bin_of_old(checkpoint: Path, component: str) -> None:
    weights, path = take_weights(checkpoint, component)
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def as_safetensors_shards(checkpoint: Path, component: str) -> None:
    path = weights_file(checkpoint, component)
    save_shards(take_weights(checkpoint, component)[0], path, save_safetensors)


def as_bin_shards(checkpoint: Path, component: str) -> None:
    save_shards(*take_weights(checkpoint, component), torch.save)


def as_fp16(checkpoint: Path, component: str) -> None:
    path = weights_file(checkpoint, component)
    save_safetensors(
        halves(take_weights(checkpoint, component)[0]), path.with_suffix("").with_suffix(".fp16.safetensors")
    )


def as_fp16_bin(checkpoint: Path, component: str) -> None:
    weights, path = take_weights(checkpoint, component)
    torch.save(halves(weights), path.with_suffix(".fp16.bin"))


def as_fp16_shards(checkpoint: Path, component: str) -> None:
    path = weights_file(checkpoint, component)
    save_shards(halves(take_weights(checkpoint, component)[0]), path, save_safetensors, ".fp16")


def assert_loads(folder: Path, expected: dict[str, dict[str, torch.Tensor]], models: tuple[str, ...] = SAMPLE) -> None:
    checkpoint = Checkpoint.find(str(folder))
    for component in models:
        loaded = checkpoint.load(component)
        assert not loaded.training
        assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
        torch.testing.assert_close(loaded.state_dict(), expected[component], rtol=0, atol=0, msg=component)


def test_every_model_loads_from_a_bin_file(copied_checkpoint, original_weights):
    for component in MODELS:
        as_bin(copied_checkpoint, component)
    assert_loads(copied_checkpoint, original_weights, MODELS)


@pytest.mark.parametrize("form", [as_bin_of_old, as_safetensors_shards, as_bin_shards])
def test_weights_are_the_same_in_every_form(copied_checkpoint, original_weights, form):
    for component in SAMPLE:
        form(copied_checkpoint, component)
    assert_loads(copied_checkpoint, original_weights)


@pytest.mark.parametrize("form", [as_fp16, as_fp16_bin, as_fp16_shards])
def test_weights_in_half_precision_only_become_float32(copied_checkpoint, original_weights, form):
    for component in SAMPLE:
        form(copied_checkpoint, component)
        if component in TRANSFORMERS_MODELS:
            edit_json(copied_checkpoint / component / "config.json", dtype="float16")
    rounded = {
        component: {name: halved.to(weights[name].dtype) for name, halved in halves(weights).items()}
        for component, weights in original_weights.items()
    }
    assert_loads(copied_checkpoint, rounded)


@pytest.mark.parametrize("form", [lambda *_: None, as_bin])
def test_full_precision_is_preferred_whatever_its_form(copied_checkpoint, original_weights, form):
    for component in SAMPLE:
        path = weights_file(copied_checkpoint, component)
        save_safetensors(halves(load_file(path)), path.with_suffix("").with_suffix(".fp16.safetensors"))
        if form is as_bin:
            weights = load_file(path)
            path.unlink()
            stem = "pytorch_model" if component in TRANSFORMERS_MODELS else "diffusion_pytorch_model"
            torch.save(weights, path.with_name(f"{stem}.bin"))
    assert_loads(copied_checkpoint, original_weights)


def test_safetensors_are_preferred_to_a_pickle(copied_checkpoint, original_weights):
    for component in SAMPLE:
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
            (copied_checkpoint / component / name).write_bytes(b"nothing that can be read")
    assert_loads(copied_checkpoint, original_weights)


def test_a_language_model_with_a_head_loads(lm_head_checkpoint, original_weights):
    loaded = Checkpoint.find(str(lm_head_checkpoint)).load("language_model")
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    torch.testing.assert_close(loaded.transformer.state_dict(), original_weights["language_model"], rtol=0, atol=0)


def test_weights_without_the_head_load_under_the_class_with_one(copied_checkpoint, original_weights):
    edit_json(copied_checkpoint / "model_index.json", language_model=["transformers", "GPT2LMHeadModel"])
    loaded = Checkpoint.find(str(copied_checkpoint)).load("language_model")
    torch.testing.assert_close(loaded.transformer.state_dict(), original_weights["language_model"], rtol=0, atol=0)


def test_only_the_class_names_of_the_index_count(copied_checkpoint, original_weights):
    edit_json(
        copied_checkpoint / "model_index.json",
        tokenizer=["transformers", "RobertaTokenizerFast"],
        tokenizer_2=["transformers", "T5TokenizerFast"],
        projection_model=["audioldm2", "AudioLDM2ProjectionModel"],
        unet=["pipeline_audioldm2", "AudioLDM2UNet2DConditionModel"],
        safety_checker=[None, None],
        force_zeros=True,
        _name_or_path="cvssp/audioldm2",
    )
    assert_loads(copied_checkpoint, original_weights)
    for component in ("tokenizer", "tokenizer_2"):
        assert Checkpoint(copied_checkpoint).load(component)("a dog barks").input_ids


def test_a_clap_tokenizer_of_vocabulary_and_merges_gives_the_same_tokens(demo_checkpoint, copied_checkpoint):
    folder = copied_checkpoint / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in model["merges"]))
    (folder / "tokenizer.json").unlink()
    texts = [*SENTENCES[:20], "", "Zürich, 5 o'clock!"]
    expected = Checkpoint.find(str(demo_checkpoint)).load("tokenizer")(texts).input_ids
    assert Checkpoint.find(str(copied_checkpoint)).load("tokenizer")(texts).input_ids == expected


def test_a_t5_tokenizer_of_sentencepiece_alone_gives_its_tokens(copied_checkpoint):
    folder = copied_checkpoint / "tokenizer_2"
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=file,
            vocab_size=200,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    (folder / "tokenizer.json").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    loaded = Checkpoint.find(str(copied_checkpoint)).load("tokenizer_2")
    for text in [*SENTENCES[:20], "two  spaces, a_dash"]:
        assert loaded(text).input_ids == [*pieces.encode(text), 1]


class Payload:
    """A pickle that creates a file when it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("component", ["text_encoder", "unet"])
def test_a_pickle_with_code_is_refused_and_never_runs(copied_checkpoint, tmp_path, component):
    marker = tmp_path / "executed"
    weights, path = take_weights(copied_checkpoint, component)
    torch.save(weights | {"payload": Payload(marker)}, path)
    with pytest.raises(CheckpointError, match=rf"{component}/\w+\.bin is damaged, or holds more than tensors: it coul"):
        Checkpoint.find(str(copied_checkpoint))
    with pytest.raises(CheckpointError, match=f"{component} can't be loaded as"):
        Checkpoint(copied_checkpoint).load(component)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload would not have worked"


def test_files_that_nobody_checked_are_not_loaded(copied_checkpoint, original_weights):
    folder = copied_checkpoint / "text_encoder"
    # transformers takes a folder with this file for one of torch.distributed, whose metadata is a plain pickle.
    (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    (folder / ".metadata").write_bytes(b"")
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    edit_json(folder / "config.json", transformers_weights="other.safetensors", attn_implementation="nobody/kernel")
    loaded = Checkpoint.find(str(copied_checkpoint)).load("text_encoder")
    assert loaded.config._attn_implementation != "nobody/kernel"
    torch.testing.assert_close(loaded.state_dict(), original_weights["text_encoder"], rtol=0, atol=0)


NEEDED_FILES = [
    *(f"{component}/config.json" for component in MODELS),
    *(f"{component}/model.safetensors" for component in TRANSFORMERS_MODELS),
    *(f"{component}/diffusion_pytorch_model.safetensors" for component in ("projection_model", "unet", "vae")),
    "tokenizer/tokenizer.json",
    "tokenizer_2/tokenizer.json",
    "feature_extractor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    "model_index.json",
]


@pytest.fixture
def no_loading(monkeypatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(Checkpoint, "load", load)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("file", NEEDED_FILES)
def test_a_missing_file_is_named_and_nothing_is_written(copied_checkpoint, tmp_path, capsys, file):
    (copied_checkpoint / file).unlink()
    assert command.main(["--checkpoint", str(copied_checkpoint), "--output", str(tmp_path / "repository")]) == 1
    assert f"export: {copied_checkpoint / file} does not exist" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()


def test_the_needed_files_are_all_files_but_tokenizer_options(demo_checkpoint):
    found = {str(path.relative_to(demo_checkpoint)) for path in demo_checkpoint.rglob("*") if path.is_file()}
    assert found - set(NEEDED_FILES) == {"tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json"}


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("file", [name for name in NEEDED_FILES if name.endswith(".json")])
@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_file_that_is_no_json_object_is_named(copied_checkpoint, file, content):
    (copied_checkpoint / file).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=rf"^{copied_checkpoint / file} (can't be read: |holds no JSON object)"):
        Checkpoint.find(str(copied_checkpoint))


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("keep", [0, 100, -1])
@pytest.mark.parametrize("form", [lambda *_: None, as_bin, as_bin_of_old, as_safetensors_shards])
def test_a_truncated_download_is_named(copied_checkpoint, form, keep):
    form(copied_checkpoint, "vae")
    path = max((copied_checkpoint / "vae").iterdir(), key=lambda file: file.stat().st_size)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=f"^{path} is damaged"):
        Checkpoint.find(str(copied_checkpoint))


@pytest.mark.usefixtures("no_loading")
def test_a_pointer_of_git_lfs_is_no_weights_file(copied_checkpoint):
    path = weights_file(copied_checkpoint, "unet")
    path.unlink()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 43613400\n")
    with pytest.raises(CheckpointError, match=f"^{path} is damaged or incomplete: download it again .with Git LFS"):
        Checkpoint.find(str(copied_checkpoint))


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("form", [as_safetensors_shards, as_bin_shards, as_fp16_shards])
def test_a_missing_shard_is_named(copied_checkpoint, form):
    form(copied_checkpoint, "unet")
    (shard,) = (copied_checkpoint / "unet").glob("*00002-of-00002*")
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"^{shard} does not exist, and \S+\.json names it"):
        Checkpoint.find(str(copied_checkpoint))


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("places", [None, {}, {"a": 1}, {"a": "../vae/model.safetensors"}, {"a": "/etc/passwd"}])
def test_an_index_that_leads_elsewhere_is_refused(copied_checkpoint, places):
    as_safetensors_shards(copied_checkpoint, "vocoder")
    index = copied_checkpoint / "vocoder" / "model.safetensors.index.json"
    edit_json(index, weight_map=places)
    with pytest.raises(CheckpointError, match=f"^{index} has no weight_map from tensors to files beside it"):
        Checkpoint.find(str(copied_checkpoint))


@pytest.mark.parametrize("component", MODELS)
def test_a_tensor_that_is_missing_is_named_not_made_up(copied_checkpoint, component):
    path = weights_file(copied_checkpoint, component)
    weights, _ = take_weights(copied_checkpoint, component)
    del weights[next(name for name in sorted(weights) if "bias" in name or "layer_norm" in name)]
    save_safetensors(weights, path)
    with pytest.raises(CheckpointError, match=rf"^{path} lacks 1 tensors, \S+ for one"):
        Checkpoint.find(str(copied_checkpoint)).load(component)


@pytest.mark.parametrize("component", ["text_encoder_2", "vae"])
@pytest.mark.usefixtures("no_loading")
def test_a_tensor_of_another_size_is_named_before_anything_is_loaded(copied_checkpoint, component):
    path = weights_file(copied_checkpoint, component)
    weights, _ = take_weights(copied_checkpoint, component)
    name = next(name for name, weight in weights.items() if weight.ndim == 1)
    save_safetensors(weights | {name: torch.ones(7)}, path)
    config = path.parent / "config.json"
    with pytest.raises(CheckpointError, match=rf"^{path} has {name} of the shape \[7\], and by {config} it would"):
        Checkpoint.find(str(copied_checkpoint))


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("component", "changes", "sentence"),
    [
        ("projection_model", {"text_encoder_dim": 9}, "text_encoder_dim in .* is 9, but projection_dim in .* is 64"),
        ("projection_model", {"text_encoder_1_dim": 9}, "text_encoder_1_dim in .* is 9, but d_model in .* is 96"),
        ("projection_model", {"langauge_model_dim": 9}, "langauge_model_dim in .* is 9, but n_embd in .* is 64"),
        ("text_encoder", {"projection_dim": 32}, "text_encoder_dim in .* is 64, but projection_dim in .* is 32"),
        ("unet", {"in_channels": 4}, "in_channels in .* is 4, but latent_channels in .* is 8"),
        ("unet", {"out_channels": 4}, "out_channels in .* is 4, but latent_channels in .* is 8"),
        ("vocoder", {"model_in_dim": 66}, "model_in_dim in .* is 66: it must be a multiple of 4"),
        ("unet", {"cross_attention_dim": 96}, r"cross_attention_dim in .* has \[96\]: .* as in \[64\]"),
        ("unet", {"cross_attention_dim": [[None, 96, 64]] * 4}, r"has \[None, 96, 64\]: .* as in \[64, 64, 96\]"),
    ],
)
def test_components_that_do_not_fit_are_named(copied_checkpoint, component, changes, sentence):
    edit_json(copied_checkpoint / component / "config.json", **changes)
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        Checkpoint.find(str(copied_checkpoint))
    assert str(copied_checkpoint / component / "config.json") in str(refusal.value)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("component", "key", "sentence"),
    [
        ("vae", "latent_channels", "latent_channels in .* is 4"),
        ("unet", "in_channels", "in_channels in .* is 4"),
        ("language_model", "n_embd", "n_embd in .* is 768"),
        ("text_encoder", "projection_dim", "projection_dim in .* is 512"),
        ("projection_model", "text_encoder_dim", "config.json lacks text_encoder_dim: it must be a whole number"),
    ],
)
def test_sizes_left_out_have_the_defaults_of_their_classes(copied_checkpoint, component, key, sentence):
    path = copied_checkpoint / component / "config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoint.find(str(copied_checkpoint))


@pytest.mark.usefixtures("no_loading")
def test_quantized_weights_are_refused(copied_checkpoint):
    path = copied_checkpoint / "text_encoder_2" / "config.json"
    edit_json(path, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match=f"{path} is of quantized weights, which aren't supported"):
        Checkpoint.find(str(copied_checkpoint))


def test_a_folder_without_model_index_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"model_index\.json does not exist: a checkpoint is a folder in diff"):
        Checkpoint.find(str(tmp_path))


@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", ["community", "AudioLDM2Pipeline"], None])
def test_another_pipeline_is_refused(copied_checkpoint, pipeline):
    edit_json(copied_checkpoint / "model_index.json", _class_name=pipeline)
    with pytest.raises(CheckpointError, match=r"is for .+: only AudioLDM2Pipeline is supported"):
        Checkpoint.find(str(copied_checkpoint))


@pytest.mark.parametrize("method", [Checkpoint.check, lambda checkpoint: checkpoint.load("unet")])
def test_a_class_that_is_not_on_the_list_is_never_imported(copied_checkpoint, method):
    edit_json(copied_checkpoint / "model_index.json", unet=["diffusers", "UNet2DModel"])
    with pytest.raises(CheckpointError, match="names the class UNet2DModel for unet: supported are AudioLDM2UNet2DCon"):
        method(Checkpoint(copied_checkpoint))


@pytest.mark.parametrize("entry", [None, [None, None], ["transformers"], "GPT2Model"])
def test_a_component_without_an_entry_is_named(copied_checkpoint, entry):
    edit_json(copied_checkpoint / "model_index.json", language_model=entry)
    with pytest.raises(CheckpointError, match=r"model_index\.json has no entry for language_model"):
        Checkpoint.find(str(copied_checkpoint))


def test_speech_checkpoints_are_not_supported_yet(copied_checkpoint):
    edit_json(
        copied_checkpoint / "model_index.json",
        text_encoder_2=["transformers", "VitsModel"],
        tokenizer_2=["transformers", "VitsTokenizer"],
    )
    with pytest.raises(
        CheckpointError, match="names VitsModel for text_encoder_2: speech checkpoints aren't supported"
    ):
        Checkpoint.find(str(copied_checkpoint))


@pytest.mark.parametrize("path", ["./nowhere", "../nowhere", "/nowhere/at/all", "~/nowhere", "three/parts/long"])
def test_what_is_plainly_a_path_is_not_looked_for_on_the_hub(monkeypatch, path):
    monkeypatch.setattr(export.checkpoint, "snapshot_download", None)
    with pytest.raises(
        CheckpointError, match=rf"^--checkpoint {path}: the folder \S*nowhere\S* does not exist\.$|three"
    ):
        Checkpoint.find(path)


def not_found() -> RepositoryNotFoundError:
    return RepositoryNotFoundError("401", response=httpx2.Response(401, request=httpx2.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (not_found(), "the hub has no such repository, or it needs an access token in HF_TOKEN"),
        (
            LocalEntryNotFoundError("long\ntext"),
            "neither the hub can be reached nor does its cache here hold the files",
        ),
        (HFValidationError("long text"), "no repository on the hub can have it"),
        (httpx2.ProxyError("long text"), r"the download from the hub failed \(ProxyError\)"),
    ],
)
def test_why_the_hub_gave_nothing_is_one_short_sentence(monkeypatch, error, sentence):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(export.checkpoint, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=rf"^--checkpoint nobody/nothing: [\w ,]*{sentence}\.$"):
        Checkpoint.find("nobody/nothing")


def test_a_checkpoint_that_is_nowhere_is_refused(tmp_path, capsys):
    assert command.main(["--checkpoint", "nobody/nothing", "--output", str(tmp_path)]) == 1
    assert "export: --checkpoint nobody/nothing: no folder has that name, and" in capsys.readouterr().err


@pytest.fixture
def hub(copied_checkpoint, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A stand-in for the hub's repository, and the folder that downloads from it go to."""
    downloaded = tmp_path / "snapshots" / COMMIT

    def download(name: str, *, allow_patterns: list[str], revision: str | None) -> str:
        assert name == "cvssp/audioldm2"
        assert revision == (COMMIT if downloaded.exists() else None)
        stored = [str(path.relative_to(copied_checkpoint)) for path in copied_checkpoint.rglob("*") if path.is_file()]
        for file in filter_repo_objects(stored, allow_patterns=allow_patterns):
            (downloaded / file).parent.mkdir(parents=True, exist_ok=True)
            (downloaded / file).unlink(missing_ok=True)
            os.link(copied_checkpoint / file, downloaded / file)
        return str(downloaded)

    monkeypatch.setattr(export.checkpoint, "snapshot_download", download)
    return copied_checkpoint, downloaded


def test_a_download_has_each_model_once_and_no_code(hub, original_weights):
    repository, downloaded = hub
    for component in MODELS:
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.fp16.safetensors", "code.py"):
            (repository / component / name).write_bytes(b"")
    (repository / "pipeline.py").write_bytes(b"")
    Checkpoint.find("cvssp/audioldm2")
    assert_loads(downloaded, original_weights)
    options = {"tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json"}
    found = {str(path.relative_to(downloaded)) for path in downloaded.rglob("*") if path.is_file()}
    assert found == set(NEEDED_FILES) | options


@pytest.mark.parametrize("form", [as_safetensors_shards, as_bin, as_bin_shards, as_fp16, as_fp16_bin, as_fp16_shards])
def test_a_download_takes_the_weights_in_the_form_that_there_is(hub, form):
    repository, downloaded = hub
    for component in ("text_encoder_2", "unet"):
        form(repository, component)
    assert Checkpoint.find("cvssp/audioldm2").folder == downloaded


def test_another_pipeline_on_the_hub_is_refused_before_its_weights_are_downloaded(hub):
    repository, downloaded = hub
    edit_json(repository / "model_index.json", _class_name=["community", "AudioLDM2Pipeline"])
    with pytest.raises(CheckpointError, match="only AudioLDM2Pipeline is supported"):
        Checkpoint.find("cvssp/audioldm2")
    assert list(downloaded.rglob("*.safetensors")) == []
