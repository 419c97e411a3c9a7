"""The stage `vocoder`: HiFi-GAN, from log-mel spectrograms to waveforms, in bounded memory.

Each sample depends on a few mel frames around it. So the spectrograms go through row by row and in windows of WINDOW
frames, each with as many frames beside it as its samples depend on; where the spectrogram ends, so does the window, for
there the convolutions must see their own padding. The samples are those of the whole, but for rounding, and the memory
is that of one window.
"""

import math
from typing import Any

import onnx_ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.loop_body import make_body, rebuilt, run_loop, take_nodes, typed_value
from export.onnx_nodes import integers
from export.onnx_stage import OnnxStage

WINDOW = 1040
"""Mel frames: a little more than the 10.24 s that checkpoints are trained on, which so take one window."""


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
    hop_length = math.prod(vocoder.config.upsample_rates)
    torch.manual_seed(0)
    example = torch.randn(2, 24, mel_bins)
    with torch.inference_mode():
        tail = vocoder(example).shape[1] - example.shape[1] * hop_length
    return OnnxStage(
        name="vocoder",
        module=Vocoder(vocoder),
        example={"mel_spectrogram": example},
        dynamic_axes={"mel_spectrogram": {0: "rows", 1: "frames"}},
        outputs=("waveform",),
        check={"mel_spectrogram": torch.randn(2, WINDOW + 40, mel_bins)},
        rewrite=lambda model: in_windows(model, hop_length, tail, halo_frames(vocoder.config)),
    )


def halo_frames(config: Any) -> int:
    """Return how many mel frames to either side a sample depends on, from a `SpeechT5HifiGanConfig`."""
    frames, hop_length = 3.0, 1  # conv_pre has a kernel of 7
    for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
        frames += math.ceil(kernel / rate) / hop_length
        hop_length *= rate
        frames += _resblock_radius(config) / hop_length
    return math.ceil(frames + 3 / hop_length)  # conv_post has a kernel of 7


def _resblock_radius(config: Any) -> int:
    """Return how many samples to either side a residual block sees, at most: pairs of a dilated and a plain kernel."""
    return max(
        sum((kernel - 1) // 2 * (dilation + 1) for dilation in dilations)
        for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
    )


def in_windows(model: onnx_ir.Model, hop_length: int, tail: int, halo: int) -> onnx_ir.Model:
    """Make a model that runs the graph of `model` on one window of one row after the other.

    Args:
        model: The vocoder, exported.
        hop_length: Samples per mel frame.
        tail: Samples that the vocoder makes beyond frames x hop_length.
        halo: Mel frames on which a window's samples depend beside its own.
    """
    weights = list(model.graph.initializers.values())
    (piece,), (samples,) = model.graph.inputs, model.graph.outputs
    mel = typed_value(str(piece.name), piece.dtype, list(piece.shape))  # type: ignore[arg-type]  # has a shape
    name, dtype, shape = str(samples.name), samples.type, samples.shape
    tape = Tape()
    rows, frames = (tape.op("Shape", [mel], {"start": axis, "end": axis + 1}) for axis in (0, 1))
    length = tape.op("Add", [tape.op("Mul", [frames, integers(tape, [hop_length])]), integers(tape, [tail])])
    most = integers(tape, [WINDOW * hop_length - 1])
    windows = tape.op("Div", [tape.op("Add", [length, most]), integers(tape, [WINDOW * hop_length])])
    body = _window_body(model.graph, mel, windows, hop_length, halo)
    (collected,) = run_loop(tape, tape.op("Squeeze", [tape.op("Mul", [rows, windows])]), [], body)
    joined = tape.op("Reshape", [collected, tape.op("Concat", [rows, integers(tape, [-1])], {"axis": 0})])
    waveform = tape.op("Slice", [joined, integers(tape, [0]), length, integers(tape, [1])])
    waveform.name, waveform.type, waveform.shape = name, dtype, shape
    return rebuilt(model, [mel], [waveform], tape, weights)


def _window_body(
    graph: onnx_ir.Graph, mel: onnx_ir.Value, windows: onnx_ir.Value, hop_length: int, halo: int
) -> onnx_ir.Graph:
    """Return a Loop's body: from the pass's number to WINDOW x hop_length samples, zeros beyond the end."""
    nodes, (piece,), (samples,) = take_nodes(graph)
    iteration = typed_value("iteration", onnx_ir.DataType.INT64, [])
    before = Tape()
    number = before.op("Unsqueeze", [iteration, integers(before, [0])])
    row, window = before.op("Div", [number, windows]), before.op("Mod", [number, windows])
    first = before.op("Mul", [window, integers(before, [WINDOW])])
    start = before.op("Max", [before.op("Sub", [first, integers(before, [halo])]), integers(before, [0])])
    end = before.op("Add", [first, integers(before, [WINDOW + halo])])  # a Slice ends at the end anyway
    one_row = before.op("Gather", [mel, row], {"axis": 0})
    piece.replace_all_uses_with(before.op("Slice", [one_row, start, end, integers(before, [1])]))
    after = Tape()
    size = WINDOW * hop_length
    skipped = after.op("Mul", [after.op("Sub", [first, start]), integers(after, [hop_length])])
    stop = after.op("Add", [skipped, integers(after, [size])])
    padding = after.op("Concat", [integers(after, [0, 0, 0]), stop], {"axis": 0})
    padded = after.op("Pad", [samples, padding])
    own = after.op("Slice", [padded, skipped, stop, integers(after, [1])])
    return make_body(iteration, [], [*before.nodes, *nodes, *after.nodes], [own])
