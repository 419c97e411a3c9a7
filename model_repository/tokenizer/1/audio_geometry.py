"""From seconds to samples, mel frames and latent frames: the one place for these conversions."""

import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AudioGeometry:
    """The sizes that tie a checkpoint's latents, mel spectrograms and waveforms together.

    The arithmetic, rounding included, is that of `diffusers.AudioLDM2Pipeline.__call__`.

    Attributes:
        sampling_rate: Hz.
        hop_length: Samples per mel frame, the product of the vocoder's upsample rates.
        num_mel_bins: Mel bins of the vocoder's input.
        vae_scale_factor: Mel frames per latent frame, and mel bins per latent bin.
        num_latent_channels: The UNet's input channels.
        default_num_latent_frames: The UNet's `sample_size`, from which the default length follows.
    """

    sampling_rate: int
    hop_length: int
    num_mel_bins: int
    vae_scale_factor: int
    num_latent_channels: int
    default_num_latent_frames: int

    @classmethod
    def load(cls, path: Path) -> "AudioGeometry":
        """Read the JSON object of these sizes that `python -m export` writes."""
        return cls(**json.loads(path.read_text()))

    @property
    def mel_frame_length_in_s(self) -> float:
        """Seconds per mel frame."""
        return self.hop_length / self.sampling_rate

    @property
    def min_audio_length_in_s(self) -> float:
        """The shortest length that the model can make, in seconds: one latent frame."""
        return self.mel_frame_length_in_s * self.vae_scale_factor

    @property
    def default_audio_length_in_s(self) -> float:
        """The length that the checkpoint was trained on, in seconds."""
        return self.default_num_latent_frames * self.vae_scale_factor * self.mel_frame_length_in_s

    def num_samples(self, audio_length_in_s: float) -> int:
        """Return how many samples a waveform of this length has."""
        return int(audio_length_in_s * self.sampling_rate)

    def num_latent_frames(self, audio_length_in_s: float) -> int:
        """Return how many latent frames cover this length: whole ones, so the model may make more than is asked for."""
        num_mel_frames = int(audio_length_in_s / self.mel_frame_length_in_s)
        return math.ceil(num_mel_frames / self.vae_scale_factor)

    def latents_shape(self, num_waveforms: int, audio_length_in_s: float) -> tuple[int, int, int, int]:
        """Return the shape of the latents: waveforms, channels, frames, bins."""
        return (
            num_waveforms,
            self.num_latent_channels,
            self.num_latent_frames(audio_length_in_s),
            self.num_mel_bins // self.vae_scale_factor,
        )
