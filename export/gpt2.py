"""The stage `gpt2`: all generated embeddings in one call, as a Loop over one exported step.

diffusers calls GPT-2 once per embedding and feeds its last hidden state back as the next input. Unrolling that into
one graph multiplies the export's time and the graph's size by the number of steps, so one step with a key-value cache
is exported, and becomes the body of an ONNX Loop: the first iteration takes the whole prompt and an empty cache, each
later one a single position.
"""

import onnx_ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor, nn
from transformers import DynamicCache, GPT2LMHeadModel, GPT2Model

from export.checkpoint import Checkpoint
from export.loop_body import make_body, rebuilt, run_loop, take_nodes, typed_value
from export.onnx_nodes import integers
from export.onnx_stage import OnnxStage


class Gpt2Step(nn.Module):
    """One generation step with an explicit key-value cache."""

    def __init__(self, model: GPT2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run GPT-2 over `new` positions after `cached` ones.

        Args:
            inputs_embeds: float32 [rows, new, width].
            attention_mask: int64 [rows, cached + new], 0 for padding.
            cache: float32 [layers, 2, rows, heads, cached, head width], keys and values.

        Returns:
            The last position's hidden state, float32 [rows, 1, width], which is also the next input; the attention
            mask with one more position; the grown cache.
        """
        cached, new = cache.shape[4], inputs_embeds.shape[1]
        past_key_values = DynamicCache(ddp_cache_data=[(layer[0], layer[1]) for layer in cache.unbind(0)])
        # Positions count from 0 whatever the mask says: diffusers gives GPT-2 no position_ids.
        positions = torch.arange(new) + cached
        visible = torch.arange(cached + new)[None, :] <= positions[:, None]
        visible = visible[None, None] & attention_mask[:, None, None, :].bool()
        output = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=visible,
            position_ids=positions[None],
            past_key_values=past_key_values,
            use_cache=True,
        )
        grown = torch.stack([torch.stack([layer.keys, layer.values]) for layer in past_key_values.layers])
        mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
        return output.last_hidden_state[:, -1:, :], mask, grown


class Gpt2Generation(nn.Module):
    """The plain loop, without a cache, which is the reference for the exported graph."""

    def __init__(self, model: GPT2Model, num_embeds: int) -> None:
        super().__init__()
        self.model = model
        self.num_embeds = num_embeds

    def forward(self, projected_prompt_embeds: Tensor, projected_attention_mask: Tensor) -> Tensor:
        """Return the generated embeddings, float32 [rows, num_embeds, width]."""
        embeds, mask = projected_prompt_embeds, projected_attention_mask
        for _ in range(self.num_embeds):
            hidden = self.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
            embeds = torch.cat([embeds, hidden[:, -1:, :]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return embeds[:, -self.num_embeds :, :]


def gpt2_stage(checkpoint: Checkpoint) -> OnnxStage:
    """Load the language model of `checkpoint` (GPT2Model or GPT2LMHeadModel) and describe its export."""
    model = checkpoint.load("language_model")
    model = model.transformer if isinstance(model, GPT2LMHeadModel) else model
    config = model.config
    num_embeds = checkpoint.config("language_model")["max_new_tokens"]
    head_width = config.n_embd // config.n_head
    torch.manual_seed(0)
    return OnnxStage(
        name="gpt2",
        module=Gpt2Step(model),
        example={
            "inputs_embeds": torch.randn(2, 5, config.n_embd),
            "attention_mask": torch.ones(2, 8, dtype=torch.int64),
            "cache": torch.randn(config.n_layer, 2, 2, config.n_head, 3, head_width),
        },
        dynamic_axes={
            "inputs_embeds": {0: "rows", 1: "new"},
            "attention_mask": {0: "rows", 1: "cached_and_new"},
            "cache": {2: "rows", 4: "cached"},
        },
        outputs=("generated_prompt_embeds",),
        check={
            "projected_prompt_embeds": torch.randn(3, 11, config.n_embd),
            "projected_attention_mask": (torch.arange(11) < torch.tensor([[11], [6], [4]])).long(),
        },
        reference=Gpt2Generation(model, num_embeds),
        rewrite=lambda step: loop_over(step, num_embeds, (config.n_layer, 2, config.n_head, head_width)),
    )


def loop_over(step: onnx_ir.Model, num_embeds: int, cache_sizes: tuple[int, int, int, int]) -> onnx_ir.Model:
    """Make a model that runs the graph of `step` `num_embeds` times and returns what every time generated.

    Args:
        step: `Gpt2Step`, exported. Its weights move to the outer graph, where the loop's body sees them.
        num_embeds: How many embeddings to generate.
        cache_sizes: The cache's fixed sizes: layers, 2, heads, head width.
    """
    weights = list(step.graph.initializers.values())
    embeds, mask, _ = step.graph.inputs
    width = step.graph.outputs[0].shape[2]  # type: ignore[index]  # the exporter always tells the shapes
    inputs = [
        typed_value("projected_prompt_embeds", embeds.dtype, ["rows", "tokens", width]),
        typed_value("projected_attention_mask", mask.dtype, ["rows", "tokens"]),
    ]
    tape = Tape()
    cache = _empty_cache(tape, inputs[0], cache_sizes)
    *_, collected = run_loop(tape, integers(tape, num_embeds), [*inputs, cache], _collecting_body(step.graph))
    generated = tape.op("Transpose", [tape.op("Squeeze", [collected, integers(tape, [2])])], {"perm": [1, 0, 2]})
    generated.name = "generated_prompt_embeds"
    generated.type, generated.shape = embeds.type, onnx_ir.Shape(["rows", num_embeds, width])
    return rebuilt(step, inputs, [generated], tape, weights)


def _collecting_body(step: onnx_ir.Graph) -> onnx_ir.Graph:
    """Return the step as a Loop's body, each hidden state also collected."""
    nodes, carried, results = take_nodes(step)
    tape = Tape()
    collected = tape.op("Identity", [results[0]])
    iteration = typed_value("iteration", onnx_ir.DataType.INT64, [])
    return make_body(iteration, carried, [*nodes, *tape.nodes], [*results, collected])


def _empty_cache(tape: Tape, embeds: onnx_ir.Value, cache_sizes: tuple[int, int, int, int]) -> onnx_ir.Value:
    layers, pair, heads, head_width = cache_sizes
    rows = tape.op("Shape", [embeds], {"start": 0, "end": 1})
    shape = [integers(tape, [layers, pair]), rows, integers(tape, [heads, 0, head_width])]
    return tape.op("ConstantOfShape", [tape.op("Concat", shape, {"axis": 0})])
