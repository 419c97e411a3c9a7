"""The stage `text_encoder`: CLAP's text tower, Flan-T5's encoder and the projection that joins both."""

import torch
from diffusers import AudioLDM2ProjectionModel
from torch import Tensor, nn
from transformers import ClapModel, T5EncoderModel

from export.checkpoint import Checkpoint
from export.onnx_stage import OnnxStage


class TextEncoder(nn.Module):
    """From two tokenisations of the same prompts to what GPT-2, the UNet and the ranking need of them."""

    def __init__(self, clap: ClapModel, t5: T5EncoderModel, projection: AudioLDM2ProjectionModel) -> None:
        super().__init__()
        self.clap_text_model = clap.text_model
        self.clap_text_projection = clap.text_projection
        self.t5 = t5
        self.projection = projection

    def forward(
        self,
        clap_input_ids: Tensor,
        clap_attention_mask: Tensor,
        t5_input_ids: Tensor,
        t5_attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode `rows` prompts.

        Args:
            clap_input_ids: int64 [rows, clap_tokens].
            clap_attention_mask: int64 [rows, clap_tokens], 1 for a token and 0 for padding.
            t5_input_ids: int64 [rows, tokens].
            t5_attention_mask: int64 [rows, tokens].

        Returns:
            projected_prompt_embeds: float32 [rows, tokens + 5, language model width], GPT-2's input: one CLAP vector
                and the T5 states, each between a start and an end vector.
            projected_attention_mask: int64 [rows, tokens + 5].
            prompt_embeds: float32 [rows, tokens, T5 width], T5's states.
            clap_text_embeds: float32 [rows, CLAP width], of length 1.
        """
        pooled = self.clap_text_model(input_ids=clap_input_ids, attention_mask=clap_attention_mask).pooler_output
        clap_text_embeds = nn.functional.normalize(self.clap_text_projection(pooled), dim=-1)
        prompt_embeds = self.t5(input_ids=t5_input_ids, attention_mask=t5_attention_mask).last_hidden_state
        projected = self.projection(
            hidden_states=clap_text_embeds[:, None, :],
            hidden_states_1=prompt_embeds,
            attention_mask=torch.ones_like(t5_attention_mask[:, :1]),
            attention_mask_1=t5_attention_mask,
        )
        return projected.hidden_states, projected.attention_mask, prompt_embeds, clap_text_embeds


def text_encoder_stage(checkpoint: Checkpoint) -> OnnxStage:
    """Load the text encoders of `checkpoint` and describe their export."""
    module = TextEncoder(
        checkpoint.load("text_encoder"), checkpoint.load("text_encoder_2"), checkpoint.load("projection_model")
    )
    axes = {
        "clap_input_ids": {0: "rows", 1: "clap_tokens"},
        "clap_attention_mask": {0: "rows", 1: "clap_tokens"},
        "t5_input_ids": {0: "rows", 1: "tokens"},
        "t5_attention_mask": {0: "rows", 1: "tokens"},
    }
    return OnnxStage(
        name="text_encoder",
        module=module.eval(),
        example=_token_inputs([9, 5], [7, 4]),
        dynamic_axes=axes,
        outputs=("projected_prompt_embeds", "projected_attention_mask", "prompt_embeds", "clap_text_embeds"),
        check=_token_inputs([2, 11, 6], [1, 3, 12]),
    )


def _token_inputs(clap_lengths: list[int], t5_lengths: list[int]) -> dict[str, Tensor]:
    """Return rows of the given lengths, padded with the tokenizers' padding (1 for CLAP, 0 for T5)."""
    clap_input_ids, clap_attention_mask = _padded(clap_lengths, padding=1)
    t5_input_ids, t5_attention_mask = _padded(t5_lengths, padding=0)
    return {
        "clap_input_ids": clap_input_ids,
        "clap_attention_mask": clap_attention_mask,
        "t5_input_ids": t5_input_ids,
        "t5_attention_mask": t5_attention_mask,
    }


def _padded(lengths: list[int], padding: int) -> tuple[Tensor, Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.arange(mask.numel()).reshape(mask.shape) % 60 + 4
    return torch.where(mask.bool(), tokens, padding), mask
