"""Guidance in an interval of the timesteps, as diffusers does it: for what ours is compared with."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import AudioLDM2Pipeline


def keeps_guidance(start: float, end: float, index: int, count: int) -> bool:
    """Say whether the forward `index` of `count` has guidance, as diffusers' ControlNet pipelines say `keeps`."""
    return not (index / count < start or (index + 1) / count > end)


@contextlib.contextmanager
def guidance_in_interval(pipeline: "AudioLDM2Pipeline", start: float, end: float) -> Iterator[None]:
    """Let a pipeline that has guidance have it in an interval of its timesteps alone.

    AudioLDM2Pipeline has no option for it, and its `callback` gets nothing that it could switch off. But guidance
    between equal predictions is none: outside, a hook puts the one with the prompt in the place of the other.
    """
    forwards = itertools.count()

    def hook(_unet: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        if keeps_guidance(start, end, next(forwards), len(pipeline.scheduler.timesteps)):
            return output
        _, with_prompt = output[0].chunk(2)
        return (torch.cat([with_prompt, with_prompt]),)

    handle = pipeline.unet.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
