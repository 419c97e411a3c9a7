"""The stage `vae`: the decoder, from latents to log-mel spectrograms, in bounded memory.

Rows go through one after the other: the memory is that of one. The decoder's middle block has one attention over all
latent positions. Exported as it stands, ONNX Runtime computes its whole N x N matrix: 60,000 positions at 150 s, over
14 GB. Each row of the matrix needs only its own query, so queries go through in groups of QUERY_GROUP, with a Scan: the
result is the same, the memory grows with N instead of N squared.
"""

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.onnx_stage import OnnxStage
from export.phased_upsampling import PhasedUpsample2D
from export.row_loop import row_by_row

QUERY_GROUP = 1024


class GroupedQueryAttnProcessor:
    """A diffusers attention processor for self-attention, exact, that holds QUERY_GROUP x N scores at a time."""

    def __call__(self, attn: Attention, hidden_states: Tensor, temb: None = None, **_: None) -> Tensor:  # noqa: ARG002
        """Return the attention's output for `hidden_states`, float32 [rows, channels, height, width].

        diffusers passes `temb` and more for other kinds of attention; in a VAE they are all None.
        """
        rows, channels, height, width = hidden_states.shape
        normed = attn.group_norm(hidden_states.view(rows, channels, height * width)).transpose(1, 2)
        query, key, value = (
            projection(normed).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        attended = grouped_attention(query * attn.scale, key, value)
        attended = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        attended = attended.transpose(1, 2).reshape(rows, channels, height, width)
        return (attended + hidden_states) / attn.rescale_output_factor


def grouped_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query key^T) value, all of [rows, heads, positions, head width]; `query` is scaled already."""
    rows, heads, positions, width = query.shape
    groups = (positions + QUERY_GROUP - 1) // QUERY_GROUP
    padded = nn.functional.pad(query, (0, 0, 0, groups * QUERY_GROUP - positions))
    grouped = padded.reshape(rows, heads, groups, QUERY_GROUP, width).permute(2, 0, 1, 3, 4)

    def attend(carry: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.matmul(group, key.transpose(2, 3))
        return carry.clone(), torch.matmul(scores.softmax(dim=-1), value)

    _, attended = torch._higher_order_ops.scan(attend, torch.zeros(1), grouped)
    return attended.permute(1, 2, 0, 3, 4).reshape(rows, heads, groups * QUERY_GROUP, width)[:, :, :positions]


class VaeDecoder(nn.Module):
    """The VAE's decoder behind the latents' scaling."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = vae.config.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents, float32 [rows, channels, frames, bins], to float32 [rows, mel frames, mel bins]."""
        return self.vae.decode(1 / self.scaling_factor * latents).sample.squeeze(1)


def vae_stage(checkpoint: Checkpoint) -> OnnxStage:
    """Load the VAE of `checkpoint` and describe its export."""
    vae, reference = checkpoint.load("vae"), checkpoint.load("vae")
    vae.set_attn_processor(GroupedQueryAttnProcessor())
    for block in vae.decoder.up_blocks:
        if block.upsamplers:
            block.upsamplers = nn.ModuleList(PhasedUpsample2D(upsampling) for upsampling in block.upsamplers)
    bins = checkpoint.config("vocoder")["model_in_dim"] // 2 ** (len(vae.config.block_out_channels) - 1)
    torch.manual_seed(0)
    return OnnxStage(
        name="vae",
        module=VaeDecoder(vae),
        example={"latents": torch.randn(2, vae.config.latent_channels, 12, bins)},
        dynamic_axes={"latents": {0: "rows", 2: "frames"}},
        outputs=("mel_spectrogram",),
        # Long enough for two groups of queries, the second one with padding.
        check={"latents": torch.randn(3, vae.config.latent_channels, QUERY_GROUP // bins + 10, bins)},
        reference=VaeDecoder(reference),
        rewrite=row_by_row,
    )
