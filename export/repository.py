"""Fills a Triton model repository from a checkpoint, all of it or nothing."""

import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from export.checkpoint import Checkpoint
from export.clap_audio import clap_audio_stage
from export.errors import VerificationError
from export.exported import write_record
from export.gpt2 import gpt2_stage
from export.manifest import ExportOptions, write_manifest
from export.model_names import CACHED_ENSEMBLE, ENSEMBLE, JOBS, STAGES, ModelNames
from export.onnx_stage import MODEL_FILE, OnnxStage, export_stage, in_fp16
from export.output_folder import VERSION, check_output, install, staging_folder
from export.pytorch_files import write_postprocess_files, write_tokenizer_files, write_unet_files
from export.text_encoder import text_encoder_stage
from export.vae import vae_stage
from export.vocoder import vocoder_stage

COMMITTED_REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"

ONNX_STAGES: Mapping[str, Callable[[Checkpoint], OnnxStage]] = {
    "text_encoder": text_encoder_stage,
    "gpt2": gpt2_stage,
    "vae": vae_stage,
    "vocoder": vocoder_stage,
    "clap_audio": clap_audio_stage,
}
FILE_STAGES: Mapping[str, Callable[[Checkpoint, Path, str], float | None]] = {
    "tokenizer": lambda checkpoint, folder, _precision: write_tokenizer_files(checkpoint, folder),
    "unet": write_unet_files,
    "postprocess": lambda checkpoint, folder, _precision: write_postprocess_files(checkpoint, folder),
}


@dataclass(frozen=True)
class StageResult:
    """How the export of one stage went.

    Attributes:
        relative_error: Against PyTorch in float32; None where nothing was converted.
        seconds: Loading, exporting and verifying.
        fp16: Whether it is an ONNX stage that computes in float16.
        refusal: Why it doesn't, where that was tried; else empty.
    """

    relative_error: float | None
    seconds: float
    fp16: bool = False
    refusal: str = ""


def export_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    *,
    name: str = ENSEMBLE,
    target: str = "cpu",
    precision: str = "fp32",
    fp16_stages: Collection[str] | None = None,
    on_start: Callable[[str], object],
    on_done: Callable[[str, StageResult], object],
) -> None:
    """Export every stage of `checkpoint` into the model repository `output`.

    The weights come into their places only when all stages are exported and verified. Where `output` isn't the
    committed repository, or the ensemble has another name, configurations and Python models are copied there too.

    Args:
        checkpoint: Where from.
        output: Where to; made if it doesn't exist.
        name: Of the ensemble. Several checkpoints lie side by side under several names; the stages of all but
            `audioldm2` get the name as a prefix, since Triton's model names are global.
        target: One of TARGETS. For `gpu`, each ONNX stage whose verification allows it is computed in float16.
        precision: Of the UNet's weights, a key of PRECISIONS, whatever the target.
        fp16_stages: Keys of ONNX_STAGES that are computed in float16, whatever the target; the others stay in float32.
            None leaves that to the target.
        on_start: Called with a stage's name before it.
        on_done: Called with a stage's name and result after it.

    Raises:
        CheckpointError: The checkpoint is incomplete or unsupported.
        VerificationError: A stage disagrees with PyTorch.
        OutputError: This user can't write `output`.
        OSError: The files can't be written, for want of room, for one.
        ValueError: The name can't be an ensemble's.
    """
    names = ModelNames(name)
    check_output(output, names)
    halved: list[str] = []
    with staging_folder(output) as staging:
        for stage in STAGES:
            on_start(stage)
            folder = staging / names.of(stage) / VERSION
            if stage in FILE_STAGES:
                result = _write_files(checkpoint, stage, folder, precision)
            elif fp16_stages is None and target == "gpu":
                result = _export_in_fp16_if_it_holds(checkpoint, stage, folder)
            else:
                result = _export_onnx(checkpoint, stage, folder, fp16=stage in (fp16_stages or ()))
            halved += [stage] * result.fp16
            on_done(stage, result)
        write_record(staging, names, checkpoint.name, target)
        if output.resolve() != COMMITTED_REPOSITORY or names.ensemble != ENSEMBLE:
            _copy_committed_files(staging, names)
        write_manifest(staging, ExportOptions(checkpoint.name, names.ensemble, precision, tuple(halved), target))
        # A smaller model than the one before may have no external data.
        data = [Path(names.of(stage)) / VERSION / f"{MODEL_FILE}.data" for stage in ONNX_STAGES]
        install(staging, output, [output / path for path in data if not (staging / path).exists()])


def _write_files(checkpoint: Checkpoint, stage: str, folder: Path, precision: str) -> StageResult:
    started = time.monotonic()
    error = FILE_STAGES[stage](checkpoint, folder, precision)
    return StageResult(error, time.monotonic() - started)


def _export_onnx(checkpoint: Checkpoint, name: str, folder: Path, *, fp16: bool) -> StageResult:
    started = time.monotonic()
    stage = ONNX_STAGES[name](checkpoint)
    error = export_stage(in_fp16(stage) if fp16 else stage, folder)
    return StageResult(error, time.monotonic() - started, fp16)


def _export_in_fp16_if_it_holds(checkpoint: Checkpoint, name: str, folder: Path) -> StageResult:
    try:
        return _export_onnx(checkpoint, name, folder, fp16=True)
    except VerificationError as error:
        shutil.rmtree(folder)  # what was saved to be verified, with a data file that float32 may not have
        return replace(_export_onnx(checkpoint, name, folder, fp16=False), refusal=str(error))


def _copy_committed_files(staging: Path, names: ModelNames) -> None:
    for model in (ENSEMBLE, CACHED_ENSEMBLE, JOBS, *STAGES):
        version = staging / names.of(model) / VERSION
        version.mkdir(parents=True, exist_ok=True)
        config = (COMMITTED_REPOSITORY / model / "config.pbtxt").read_text(encoding="utf-8")
        (version.parent / "config.pbtxt").write_text(names.rename(config), encoding="utf-8")
        for module in (COMMITTED_REPOSITORY / model / VERSION).glob("*.py"):
            shutil.copy(module, version)
