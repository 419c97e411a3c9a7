"""The UNet's cross-attention, with keys and values that are computed once per request and not once per step.

Keys and values depend on the text alone. Those of all layers are one matrix product here, `TextProjection`; a request's
rows of it are what the loop packs, and each layer reads its own columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from device_copies import to_device
from diffusers import AudioLDM2UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

MASK_OF_PADDING = -1.0
"""The UNet turns a mask value m into a bias of (1 - m) * -10000: padding gets -20000, which is below a masked token's
-10000 by enough to vanish even where every token is masked."""


@dataclass(frozen=True)
class Conditioning:
    """The projected text of some rows.

    Attributes:
        generated: [rows, vectors, width], of GPT-2's vectors: keys and values of all layers.
        prompt: [rows, tokens, width], of T5's states.
        attention_mask: [rows, tokens], 1 for tokens, 0 for masked ones, MASK_OF_PADDING for padding added here.
    """

    generated: Tensor
    prompt: Tensor
    attention_mask: Tensor

    @property
    def tokens(self) -> int:
        """T5 states in a row."""
        return self.prompt.shape[1]

    def rows(self, index: Tensor) -> "Conditioning":
        """Return a copy of some rows; int64 [rows]."""
        return Conditioning(*(tensor.index_select(0, index) for tensor in vars(self).values()))

    def padded(self, tokens: int) -> "Conditioning":
        """Return the same with more tokens, under the mask."""
        missing = tokens - self.tokens
        return Conditioning(
            self.generated,
            functional.pad(self.prompt, (0, 0, 0, missing)),
            functional.pad(self.attention_mask, (0, missing), value=MASK_OF_PADDING),
        )


def concatenate(parts: list[Conditioning], tokens: int) -> Conditioning:
    """Return the rows of all `parts`, padded to `tokens`."""
    padded = [vars(part.padded(tokens)).values() for part in parts]
    return Conditioning(*(torch.cat(tensors) for tensors in zip(*padded, strict=True)))


class TextProjection(nn.Module):
    """Keys and values of every cross-attention layer; the layers keep queries and outputs.

    Args:
        unet: Its layers are changed: from now on its forward takes Conditioning's tensors for the text's states.
    """

    def __init__(self, unet: AudioLDM2UNet2DConditionModel) -> None:
        super().__init__()
        generated, prompt = _cross_attentions(unet)
        self.generated = _merge(generated)
        self.prompt = _merge(prompt)

    def forward(self, generated_prompt_embeds: Tensor, prompt_embeds: Tensor, attention_mask: Tensor) -> Conditioning:
        """Project the text of a request.

        Args:
            generated_prompt_embeds: float32 [rows, vectors, GPT-2 width].
            prompt_embeds: float32 [rows, tokens, T5 width].
            attention_mask: int64 [rows, tokens].
        """
        weight = self.prompt.weight
        generated, prompt, mask = (
            to_device(tensor, weight.device).to(weight.dtype)
            for tensor in (generated_prompt_embeds, prompt_embeds, attention_mask)
        )
        return Conditioning(self.generated(generated), self.prompt(prompt), mask)


class ProjectedAttention:
    """An attention processor for diffusers: reads its keys and values out of Conditioning's columns."""

    def __init__(self, keys: slice, values: slice) -> None:
        self._keys, self._values = keys, values

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend; [rows, positions, channels] -> the same, with a bias of [rows, 1, tokens] or None."""
        query, key, value = (
            tensor.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for tensor in (
                attn.to_q(hidden_states),
                encoder_hidden_states[:, :, self._keys],
                encoder_hidden_states[:, :, self._values],
            )
        )
        bias = None if attention_mask is None else attention_mask[:, None]
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return attn.to_out[0](output.transpose(1, 2).flatten(2))


def _cross_attentions(unet: AudioLDM2UNet2DConditionModel) -> tuple[list[Attention], list[Attention]]:
    """Return the layers that attend to GPT-2's vectors, and those that attend to T5's states."""
    generated: list[Attention] = []
    prompt: list[Attention] = []
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for index, attention in _attentions(unet, block):
            # As in diffusers' blocks: of a layer's transformers, the first two see the first text, the rest the second.
            (generated if index <= 1 else prompt).append(attention)
    return generated, prompt


def _attentions(unet: AudioLDM2UNet2DConditionModel, block: Any) -> Iterator[tuple[int, Attention]]:
    transformers = getattr(block, "attentions", ())
    num_layers = len(block.resnets) - (1 if block is unet.mid_block else 0)
    per_layer = len(transformers) // num_layers
    for position, transformer in enumerate(transformers):
        for basic_block in transformer.transformer_blocks:
            for attention in (basic_block.attn1, basic_block.attn2):
                if attention is not None and attention.is_cross_attention:
                    yield position % per_layer, attention


def _merge(attentions: list[Attention]) -> nn.Linear:
    """Move the layers' projections into one linear layer, and give each layer its columns."""
    parts = []
    start = 0
    for attention in attentions:
        width = attention.to_k.out_features
        attention.set_processor(
            ProjectedAttention(slice(start, start + width), slice(start + width, start + 2 * width))
        )
        parts += [attention.to_k, attention.to_v]
        start += 2 * width
        del attention.to_k, attention.to_v
    has_bias = parts[0].bias is not None
    merged = nn.Linear(parts[0].in_features, start, bias=has_bias, dtype=parts[0].weight.dtype)
    merged.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if has_bias:
        merged.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return merged
