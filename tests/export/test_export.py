"""The export: verified stages, all or nothing, and a sentence for what can't be exported."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import nn

from export import __main__ as command
from export import onnx_stage, repository
from export.checkpoint import Checkpoint
from export.demo import count_parameters, write_checkpoint
from export.exported import recorded
from export.gpt2 import gpt2_stage
from export.manifest import manifest_path, read_manifest
from export.model_names import ModelNames
from export.onnx_stage import (
    MAX_FP16_ERROR,
    MAX_RELATIVE_ERROR,
    OnnxStage,
    VerificationError,
    export_stage,
    in_fp16,
    relative_error,
)
from export.pytorch_files import PRECISIONS, write_unet_files
from export.target import choose_target
from export.vae import QUERY_GROUP, VaeDecoder
from export.vocoder import WINDOW, halo_frames, vocoder_stage


def files(folder: Path) -> set[str]:
    """Relative paths of the files in `folder`; Python's bytecode is left out: a server may have put it there."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_every_stage_agrees_with_pytorch(exported_repository, export_results):
    assert exported_repository.is_dir()
    errors = {stage: result.relative_error for stage, result in export_results.items()}
    assert errors.keys() == {"text_encoder", "gpt2", "vae", "vocoder", "clap_audio", "tokenizer", "unet", "postprocess"}
    measured = [error for error in errors.values() if error is not None]
    assert len(measured) == 5
    assert 0 < min(measured) <= max(measured) <= MAX_RELATIVE_ERROR


@pytest.mark.parametrize(("precision", "bounds"), [("bf16", (1e-3, 5e-2)), ("fp16", (1e-4, 5e-3))])
def test_a_rounded_unet_is_close_and_its_error_is_told(demo_checkpoint, tmp_path, precision, bounds):
    error = write_unet_files(Checkpoint.find(str(demo_checkpoint)), tmp_path, precision)
    assert bounds[0] < error < bounds[1]
    with safe_open(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as weights:
        dtypes = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    assert dtypes == {PRECISIONS[precision]}


def test_the_unet_is_not_rounded_unless_it_is_asked_for(demo_checkpoint, tmp_path):
    assert write_unet_files(Checkpoint.find(str(demo_checkpoint)), tmp_path) is None


def test_a_new_folder_becomes_a_complete_repository(exported_repository):
    committed = {
        str(path.relative_to(repository.COMMITTED_REPOSITORY))
        for pattern in ("*/config.pbtxt", "*/1/*.py")
        for path in repository.COMMITTED_REPOSITORY.glob(pattern)
    }
    weights = {f"{stage}/1/model.onnx" for stage in repository.ONNX_STAGES} | {
        "postprocess/1/preprocessor_config.json",
        "tokenizer/1/audio_geometry.json",
        "tokenizer/1/checkpoint.json",
        "tokenizer/1/manifest.json",
        "tokenizer/1/scheduler_classes.json",
        "tokenizer/1/clap_tokenizer.json",
        "tokenizer/1/t5_tokenizer.json",
        "unet/1/unet/config.json",
        "unet/1/unet/diffusion_pytorch_model.safetensors",
        "unet/1/scheduler/scheduler_config.json",
    }
    assert files(exported_repository) == committed | weights
    assert (exported_repository / "audioldm2" / "1").is_dir()


def test_exported_files_hold_no_trace_of_this_machine(exported_repository):
    for path in exported_repository.rglob("*.onnx"):
        content = path.read_bytes()
        assert b"site-packages" not in content, path
        assert str(Path(__file__).parents[2]).encode() not in content, path


def test_gpt2_is_one_loop_with_one_copy_of_the_weights(exported_repository):
    model = onnx.load(exported_repository / "gpt2" / "1" / "model.onnx")
    (loop,) = [node for node in model.graph.node if node.op_type == "Loop"]
    body = loop.attribute[0].g
    assert len(body.node) > len(model.graph.node)
    assert len(body.initializer) == 0


def test_gpt2_under_either_class_name_gives_the_same_embeddings(exported_repository, lm_head_checkpoint, tmp_path):
    stage = gpt2_stage(Checkpoint.find(str(lm_head_checkpoint)))
    export_stage(stage, tmp_path)
    inputs = {name: tensor.numpy() for name, tensor in stage.check.items()}
    results = [
        onnxruntime.InferenceSession(folder / "model.onnx").run(None, inputs)[0]
        for folder in (tmp_path, exported_repository / "gpt2" / "1")
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("positions", [16, QUERY_GROUP - 16, QUERY_GROUP, 2 * QUERY_GROUP + 16])
def test_attention_over_groups_of_queries_is_exact(demo_checkpoint, exported_repository, positions):
    vae = Checkpoint.find(str(demo_checkpoint)).load("vae")
    torch.manual_seed(positions)
    latents = torch.randn(1, 8, positions // 16, 16)
    with torch.inference_mode():
        expected = VaeDecoder(vae)(latents).numpy()
    session = onnxruntime.InferenceSession(exported_repository / "vae" / "1" / "model.onnx")
    assert relative_error(session.run(None, {"latents": latents.numpy()})[0], expected) < 1e-5


@pytest.fixture(scope="module")
def vocoder(demo_checkpoint):
    return Checkpoint.find(str(demo_checkpoint)).load("vocoder")


@pytest.mark.parametrize("frames", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 17])
def test_windows_of_the_vocoder_leave_no_seam(vocoder, exported_repository, frames):
    torch.manual_seed(frames)
    mel = torch.randn(2, frames, 64)
    with torch.inference_mode():
        expected = vocoder(mel).numpy()
    session = onnxruntime.InferenceSession(exported_repository / "vocoder" / "1" / "model.onnx")
    waveform = session.run(None, {"mel_spectrogram": mel.numpy()})[0]
    assert waveform.shape == expected.shape
    # Relative to the whole, so that a seam of a few samples is seen too.
    assert np.abs(waveform - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_a_halo_that_is_too_small_is_refused(demo_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("export.vocoder.halo_frames", lambda _: 2)
    with pytest.raises(VerificationError, match="vocoder: output waveform differs"):
        export_stage(vocoder_stage(Checkpoint.find(str(demo_checkpoint))), tmp_path)


def test_the_halo_is_what_a_sample_depends_on(vocoder):
    halo, hop_length, frame = halo_frames(vocoder.config), 160, 50
    mel = torch.zeros(2, 2 * frame, 64)
    mel[1, frame] = 1.0
    with torch.inference_mode():
        still, moved = vocoder(mel)
    changed = (still != moved).nonzero().flatten() / hop_length
    assert frame - halo <= changed.min()
    assert changed.max() <= frame + 1 + halo
    assert halo <= 1.5 * (frame - changed.min())


@pytest.mark.parametrize("stage", ["text_encoder", "gpt2", "vae", "vocoder", "clap_audio"])
def test_a_stage_in_fp16_keeps_its_tensors_and_its_result(stage, demo_checkpoint, exported_repository, tmp_path):
    error = export_stage(in_fp16(repository.ONNX_STAGES[stage](Checkpoint.find(str(demo_checkpoint)))), tmp_path)
    assert 1e-6 < error < MAX_FP16_ERROR
    exact, half = exported_repository / stage / "1" / "model.onnx", tmp_path / "model.onnx"
    assert half.stat().st_size < 0.7 * exact.stat().st_size
    signatures = [
        [(tensor.name, tensor.type) for tensor in (*session.get_inputs(), *session.get_outputs())]
        for session in (onnxruntime.InferenceSession(exact), onnxruntime.InferenceSession(half))
    ]
    assert signatures[0] == signatures[1]


def test_a_graph_that_disagrees_with_pytorch_is_refused(tmp_path):
    stage = OnnxStage(
        name="double",
        module=nn.Linear(4, 4),
        example={"input": torch.randn(2, 4)},
        dynamic_axes={"input": {0: "rows"}},
        outputs=("output",),
        check={"input": torch.randn(3, 4)},
        reference=lambda **_: torch.ones(3, 4),
    )
    with pytest.raises(VerificationError, match=r"double: output output differs from PyTorch by \d.*more than 1e-03"):
        export_stage(stage, tmp_path)


def linear_stage(name, *weights):
    """Linear layers, one for each weight, that multiply by it."""
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in weights))
    for layer, weight in zip(layers, weights, strict=True):
        nn.init.eye_(layer.weight).data.mul_(weight)
    return OnnxStage(
        name=name,
        module=layers,
        example={"input": torch.ones(2, 4)},
        dynamic_axes={"input": {0: "rows"}},
        outputs=("output",),
        check={"input": torch.ones(3, 4)},
    )


def test_what_overflows_in_fp16_on_the_way_is_refused_though_its_result_would_fit(tmp_path):
    assert export_stage(linear_stage("narrow", 1e4, 1e-4), tmp_path) < MAX_RELATIVE_ERROR
    assert export_stage(in_fp16(linear_stage("narrow", 1e4, 1e-4)), tmp_path) < MAX_FP16_ERROR
    assert export_stage(linear_stage("wide", 1e4, 10, 1e-5), tmp_path) < MAX_RELATIVE_ERROR
    with pytest.raises(VerificationError, match=r"wide: activations of up to 1.0e\+05 are above 6.6e\+04, the largest"):
        export_stage(in_fp16(linear_stage("wide", 1e4, 10, 1e-5)), tmp_path)


@pytest.fixture
def linear_stages(monkeypatch):
    """Two stages to export, one of which doesn't bear fp16."""
    stages = {
        "vae": lambda _: linear_stage("vae", 1e4, 1e-4),
        "vocoder": lambda _: linear_stage("vocoder", 1e4, 10, 1e-5),
    }
    monkeypatch.setattr(repository, "ONNX_STAGES", stages)
    monkeypatch.setattr(repository, "STAGES", tuple(stages))


def fp16_files(output):
    """The stages in `output` whose weights are in float16."""
    models = {path.parts[-3]: onnx.load(path) for path in sorted(output.glob("*/1/model.onnx"))}
    return [
        stage
        for stage, model in models.items()
        if {weight.data_type for weight in model.graph.initializer} == {onnx.TensorProto.FLOAT16}
    ]


@pytest.mark.usefixtures("linear_stages")
@pytest.mark.parametrize(
    ("options", "halved"),
    [
        (["--target", "gpu"], ["vae"]),
        (["--target", "cpu"], []),
        (["--target", "cpu", "--fp16-stages", "vae"], ["vae"]),
        (["--target", "gpu", "--fp16-stages", "text_encoder"], []),
    ],
)
def test_for_a_gpu_stages_are_in_fp16_where_it_holds_and_options_of_ones_own_win(
    options, halved, demo_checkpoint, tmp_path, capsys
):
    output = tmp_path / "models"
    assert command.main(["--checkpoint", str(demo_checkpoint), "--output", str(output), *options]) == 0
    assert fp16_files(output) == halved
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if line.endswith("  fp16")] == halved
    tried = "--fp16-stages" not in options and "gpu" in options
    assert any(line.startswith("vocoder       stays in fp32; in fp16, vocoder: activat") for line in said) == tried
    manifest = read_manifest(manifest_path(output, ModelNames()))
    assert (manifest.options.target, manifest.options.fp16_stages) == (options[1], tuple(halved))
    assert recorded(output, ModelNames()).target == options[1]


@pytest.mark.usefixtures("linear_stages")
def test_a_stage_that_is_named_and_does_not_bear_fp16_is_refused(demo_checkpoint, tmp_path, capsys):
    arguments = ["--checkpoint", str(demo_checkpoint), "--output", str(tmp_path / "models")]
    assert command.main([*arguments, "--fp16-stages", "vocoder"]) == 1
    assert "export: vocoder: activations of up to 1.0e+05 are above" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("wanted", "torch_has_gpu", "providers", "target"),
    [
        ("auto", False, ["CPUExecutionProvider"], "cpu"),
        ("auto", True, ["CPUExecutionProvider"], "gpu"),
        ("auto", False, ["CUDAExecutionProvider", "CPUExecutionProvider"], "gpu"),
        ("cpu", True, ["CUDAExecutionProvider"], "cpu"),
        ("gpu", False, ["CPUExecutionProvider"], "gpu"),
    ],
)
def test_without_a_target_it_is_what_the_machine_has(wanted, torch_has_gpu, providers, target, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_has_gpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    assert choose_target(wanted) == target


@pytest.mark.parametrize("bad", [np.full(3, np.nan), np.ones(4), np.full(3, np.inf)])
def test_relative_error_is_infinite_for_what_is_not_comparable(bad):
    assert relative_error(bad, np.ones(3)) == float("inf")


@pytest.mark.slow
def test_a_failed_verification_changes_nothing(demo_checkpoint, tmp_path, monkeypatch, capsys):
    output = tmp_path / "model_repository"
    old = output / "vocoder" / "1" / "model.onnx"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    real = repository.ONNX_STAGES["vae"]
    stages = {
        "vocoder": repository.ONNX_STAGES["vocoder"],
        "vae": lambda checkpoint: dataclasses.replace(real(checkpoint), reference=lambda latents: latents[:, 0]),
    }
    monkeypatch.setattr(repository, "ONNX_STAGES", stages)
    monkeypatch.setattr(repository, "STAGES", tuple(stages))
    assert command.main(["--checkpoint", str(demo_checkpoint), "--output", str(output)]) == 1
    assert "vae: output mel_spectrogram differs from PyTorch by inf" in capsys.readouterr().err
    assert files(output) == {"vocoder/1/model.onnx"}
    assert old.read_bytes() == b"old"


@pytest.mark.slow
def test_large_weights_go_to_a_file_of_their_own(lm_head_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_stage, "EXTERNAL_DATA_FROM_BYTES", 100_000)
    export_stage(gpt2_stage(Checkpoint.find(str(lm_head_checkpoint))), tmp_path)
    assert files(tmp_path) == {"model.onnx", "model.onnx.data"}
    assert (tmp_path / "model.onnx").stat().st_size < (tmp_path / "model.onnx.data").stat().st_size


def test_equal_seeds_give_equal_checkpoints(demo_checkpoint, tmp_path):
    write_checkpoint(tmp_path / "same")
    write_checkpoint(tmp_path / "other", seed=1)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "same" / weights).read_bytes() == (demo_checkpoint / weights).read_bytes()
    assert (tmp_path / "other" / weights).read_bytes() != (demo_checkpoint / weights).read_bytes()
    for tokenizer in ("tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"):
        assert (tmp_path / "same" / tokenizer).read_bytes() == (demo_checkpoint / tokenizer).read_bytes()


def test_the_demo_checkpoint_is_small(demo_checkpoint):
    assert 10e6 < count_parameters(demo_checkpoint) < 20e6
