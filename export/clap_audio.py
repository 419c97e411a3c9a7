"""The stage `clap_audio`: CLAP's audio tower, with which candidates are ranked."""

import torch
from torch import Tensor, nn
from transformers import ClapModel

from export.checkpoint import Checkpoint
from export.onnx_stage import OnnxStage


class ClapAudio(nn.Module):
    """CLAP's audio tower and its projection, to vectors of length 1."""

    def __init__(self, clap: ClapModel) -> None:
        super().__init__()
        self.audio_model = clap.audio_model
        self.audio_projection = clap.audio_projection

    def forward(self, input_features: Tensor) -> Tensor:
        """Embed log-mel features, float32 [rows, 1, frames, mel bins], as float32 [rows, CLAP width]."""
        pooled = self.audio_model(input_features=input_features).pooler_output
        return nn.functional.normalize(self.audio_projection(pooled), dim=-1)


def clap_audio_stage(checkpoint: Checkpoint) -> OnnxStage:
    """Load the audio tower of `checkpoint` and describe its export."""
    clap, feature_extractor = checkpoint.load("text_encoder"), checkpoint.load("feature_extractor")
    frames = feature_extractor.nb_max_samples // feature_extractor.hop_length + 1
    torch.manual_seed(0)
    return OnnxStage(
        name="clap_audio",
        module=ClapAudio(clap).eval(),
        example={"input_features": torch.randn(2, 1, frames, feature_extractor.feature_size)},
        dynamic_axes={"input_features": {0: "rows"}},
        outputs=("audio_embeds",),
        check={"input_features": torch.randn(3, 1, frames, feature_extractor.feature_size)},
    )
