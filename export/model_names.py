"""The names of one checkpoint's models in a repository that may hold several checkpoints."""

import contextlib
import re
from dataclasses import dataclass

ENSEMBLE = "audioldm2"
"""The ensemble in the committed repository."""

CACHED_ENSEMBLE = "audioldm2_cached"
"""The ensemble around it whose answers Triton may cache."""

ONNX_STAGES = ("text_encoder", "gpt2", "vae", "vocoder", "clap_audio")
"""The stages that run in ONNX Runtime, in the order of their export."""

FILE_STAGES = ("tokenizer", "unet", "postprocess")
"""The stages in Python; what they load is written without conversion."""

STAGES = (*ONNX_STAGES, *FILE_STAGES)
"""In the order of their export. What else the committed repository has, the ensembles and `jobs`, has no weights."""

PRECISION_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What the UNet's weights can be rounded to, and torch's name for it."""

JOBS = "jobs"
"""The model that watches and cancels requests; it is no stage, and has no weights."""

_TAKEN = (*STAGES, CACHED_ENSEMBLE, JOBS)

_REFERENCES = (
    r'^name: "(\w+)"',  # a model's own name, which stands at the start of a line, unlike a tensor's
    r'model_name: "(\w+)"',  # a step of the ensemble
    r'key: "\w+_model" value: { string_value: "(\w+)" }',  # a model that a Python model calls, or whose modules it uses
)


@dataclass(frozen=True)
class ModelNames:
    """Names of the models behind one ensemble: the committed ones for `audioldm2`, prefixed ones for any other.

    Attributes:
        ensemble: The public name: letters, digits and underscores, and not that of another model.
    """

    ensemble: str = ENSEMBLE

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z]\w*", self.ensemble, re.ASCII) or self.ensemble in _TAKEN:
            raise ValueError(
                f"--name must be letters, digits and underscores, starting with a letter, and none of "
                f"{', '.join(_TAKEN)}; got {self.ensemble!r}."
            )

    def of(self, model: str) -> str:
        """Return the name here of a model of the committed repository."""
        if model in (ENSEMBLE, CACHED_ENSEMBLE):
            return model.replace(ENSEMBLE, self.ensemble, 1)
        return model if self.ensemble == ENSEMBLE else f"{self.ensemble}_{model}"

    def rename(self, config: str) -> str:
        """Return the text of a committed config.pbtxt with every model's name replaced."""
        for pattern in _REFERENCES:
            config = re.sub(pattern, self._replace, config, flags=re.MULTILINE)
        return config

    def _replace(self, reference: re.Match[str]) -> str:
        whole, model = reference.group(0), reference.group(1)
        return whole.replace(f'"{model}"', f'"{self.of(model)}"')


def ensemble_of(model: str) -> str:
    """Return the ensemble that a stage of this name belongs to; `audioldm2` where the name isn't that of a stage."""
    for stage in (*STAGES, JOBS):
        with contextlib.suppress(ValueError):
            if (names := ModelNames(model.removesuffix(f"_{stage}"))).of(stage) == model:
                return names.ensemble
    return ENSEMBLE
