"""The stage `vocoder`: HiFi-GAN, from log-mel spectrograms to waveforms."""

import torch
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.onnx_stage import OnnxStage


class Vocoder(nn.Module):
    """`SpeechT5HifiGan` with the Triton model's names."""

    def __init__(self, vocoder: nn.Module) -> None:
        super().__init__()
        self.vocoder = vocoder

    def forward(self, mel_spectrogram: Tensor) -> Tensor:
        """Turn log-mel spectrograms, float32 [rows, frames, mel bins], into waveforms, float32 [rows, samples]."""
        return self.vocoder(mel_spectrogram)


def vocoder_stage(checkpoint: Checkpoint) -> OnnxStage:
    """Load the vocoder of `checkpoint` and describe its export."""
    vocoder = checkpoint.load("vocoder")
    mel_bins = vocoder.config.model_in_dim
    torch.manual_seed(0)
    return OnnxStage(
        name="vocoder",
        module=Vocoder(vocoder),
        example={"mel_spectrogram": torch.randn(2, 24, mel_bins)},
        dynamic_axes={"mel_spectrogram": {0: "rows", 1: "frames"}},
        outputs=("waveform",),
        check={"mel_spectrogram": torch.randn(3, 40, mel_bins)},
    )
