"""Fills a Triton model repository from a checkpoint, all of it or nothing."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint import Checkpoint
from export.clap_audio import clap_audio_stage
from export.gpt2 import gpt2_stage
from export.model_names import CACHED_ENSEMBLE, ENSEMBLE, JOBS, ModelNames
from export.onnx_stage import MODEL_FILE, OnnxStage, export_stage, in_fp16
from export.pytorch_files import write_postprocess_files, write_tokenizer_files, write_unet_files
from export.text_encoder import text_encoder_stage
from export.vae import vae_stage
from export.vocoder import vocoder_stage

COMMITTED_REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"
VERSION = "1"

ONNX_STAGES: dict[str, Callable[[Checkpoint], OnnxStage]] = {
    "text_encoder": text_encoder_stage,
    "gpt2": gpt2_stage,
    "vae": vae_stage,
    "vocoder": vocoder_stage,
    "clap_audio": clap_audio_stage,
}
FILE_STAGES: dict[str, Callable[[Checkpoint, Path, str], float | None]] = {
    "tokenizer": lambda checkpoint, folder, _precision: write_tokenizer_files(checkpoint, folder),
    "unet": write_unet_files,
    "postprocess": lambda checkpoint, folder, _precision: write_postprocess_files(checkpoint, folder),
}
STAGES = (*ONNX_STAGES, *FILE_STAGES)
"""In the order of their export. What else the committed repository has, the ensembles and `jobs`, has no weights."""


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
        OSError: The files can't be written.
        ValueError: The name can't be an ensemble's.
    """
    names = ModelNames(name)
    output.mkdir(parents=True, exist_ok=True)
    with _staging_folder(output) as staging:
        for stage in STAGES:
            on_start(stage)
            started = time.monotonic()
            folder = staging / stage / VERSION
            error = _export_stage(checkpoint, stage, folder, precision, fp16=stage in fp16_stages)
            on_done(stage, StageResult(error, time.monotonic() - started))
        _install(staging, output, names)


def _export_stage(checkpoint: Checkpoint, name: str, folder: Path, precision: str, *, fp16: bool) -> float | None:
    if name in FILE_STAGES:
        return FILE_STAGES[name](checkpoint, folder, precision)
    stage = ONNX_STAGES[name](checkpoint)
    return export_stage(in_fp16(stage) if fp16 else stage, folder)


@contextlib.contextmanager
def _staging_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output`, gone afterwards. Inside of it, Triton would take even a hidden folder for a model."""
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.resolve().parent) as folder:
        yield Path(folder)


def _install(staging: Path, output: Path, names: ModelNames) -> None:
    if output.resolve() != COMMITTED_REPOSITORY or names.ensemble != ENSEMBLE:
        _copy_committed_files(output, names)
    for stage in STAGES:
        version = output / names.of(stage) / VERSION
        # A smaller model than the one before may have no external data.
        (version / f"{MODEL_FILE}.data").unlink(missing_ok=True)
        for path in sorted((staging / stage / VERSION).iterdir()):
            _replace(path, version / path.name)


def _copy_committed_files(output: Path, names: ModelNames) -> None:
    for model in (ENSEMBLE, CACHED_ENSEMBLE, JOBS, *STAGES):
        version = output / names.of(model) / VERSION
        version.mkdir(parents=True, exist_ok=True)
        config = (COMMITTED_REPOSITORY / model / "config.pbtxt").read_text()
        (version.parent / "config.pbtxt").write_text(names.rename(config))
        for module in (COMMITTED_REPOSITORY / model / VERSION).glob("*.py"):
            shutil.copy(module, version)


def _replace(new: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():
        shutil.rmtree(place)
    shutil.move(new, place)  # a rename, unless `output` is a mount of its own
