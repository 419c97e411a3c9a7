"""Fills a Triton model repository from a checkpoint, all of it or nothing."""

import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint import Checkpoint
from export.clap_audio import clap_audio_stage
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
    """

    relative_error: float | None
    seconds: float


def export_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    *,
    name: str = ENSEMBLE,
    precision: str = "fp32",
    fp16_stages: Collection[str] = (),
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
        precision: Of the UNet's weights, a key of PRECISIONS.
        fp16_stages: Keys of ONNX_STAGES that are computed in float16; the others stay in float32.
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
    with staging_folder(output) as staging:
        for stage in STAGES:
            on_start(stage)
            started = time.monotonic()
            folder = staging / names.of(stage) / VERSION
            error = _export_stage(checkpoint, stage, folder, precision, fp16=stage in fp16_stages)
            on_done(stage, StageResult(error, time.monotonic() - started))
        write_record(staging, names, checkpoint.name)
        if output.resolve() != COMMITTED_REPOSITORY or names.ensemble != ENSEMBLE:
            _copy_committed_files(staging, names)
        fp16 = tuple(stage for stage in ONNX_STAGES if stage in fp16_stages)
        write_manifest(staging, ExportOptions(checkpoint.name, names.ensemble, precision, fp16))
        # A smaller model than the one before may have no external data.
        data = [Path(names.of(stage)) / VERSION / f"{MODEL_FILE}.data" for stage in ONNX_STAGES]
        install(staging, output, [output / path for path in data if not (staging / path).exists()])


def _export_stage(checkpoint: Checkpoint, name: str, folder: Path, precision: str, *, fp16: bool) -> float | None:
    if name in FILE_STAGES:
        return FILE_STAGES[name](checkpoint, folder, precision)
    stage = ONNX_STAGES[name](checkpoint)
    return export_stage(in_fp16(stage) if fp16 else stage, folder)


def _copy_committed_files(staging: Path, names: ModelNames) -> None:
    for model in (ENSEMBLE, CACHED_ENSEMBLE, JOBS, *STAGES):
        version = staging / names.of(model) / VERSION
        version.mkdir(parents=True, exist_ok=True)
        config = (COMMITTED_REPOSITORY / model / "config.pbtxt").read_text(encoding="utf-8")
        (version.parent / "config.pbtxt").write_text(names.rename(config), encoding="utf-8")
        for module in (COMMITTED_REPOSITORY / model / VERSION).glob("*.py"):
            shutil.copy(module, version)
