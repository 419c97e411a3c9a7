"""Whether a checkpoint bears half precision: its own weights are tried, before anybody is served."""

from collections.abc import Callable, Sequence

import torch
from text_conditioning import Conditioning
from torch import Tensor
from unet_forward import UNetForward
from unet_shapes import NUM_BINS, NUM_VECTORS

MAX_ERROR = 0.05
"""Relative RMS of the predicted noise against float32, and nothing infinite: then a type is good enough. The official
size has 0.001 in float16 and 0.01 in bfloat16; what overflows has NaN."""

TIMESTEPS = (999.0, 500.0, 1.0)
"""The first, one in between and the last: the sizes of activations differ along the way."""

FRAMES, TOKENS = 64, 16


def load_in_the_first_that_holds(
    load: Callable[[torch.dtype | None], UNetForward],
    dtypes: Sequence[torch.dtype | None],
    report: Callable[[str], object],
) -> UNetForward:
    """Return the UNet in the first of some types that it bears; in float32 if it bears none.

    Args:
        load: Loads it in a type; None is the one that was exported.
        dtypes: What to try. Where it is one alone, it is taken as it is.
        report: Called with a sentence for each that doesn't hold.
    """
    if len(dtypes) == 1:
        return load(dtypes[0])
    expected = _predict(load(torch.float32))
    for dtype in dtypes:
        unet = load(dtype)
        error = _relative_rms(_predict(unet), expected)
        if error <= MAX_ERROR:  # not so for NaN
            return unet
        report(
            f"{dtype} doesn't hold for this checkpoint: its error against float32 is {error:.2g}, above {MAX_ERROR}."
        )
        del unet
    return load(torch.float32)


@torch.inference_mode()
def _predict(unet: UNetForward) -> Tensor:
    """Predict the noise of random latents, with random text; float32 on the CPU."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows, sizes = len(TIMESTEPS), unet.sizes
    text: Conditioning = unet.project(
        random(rows, NUM_VECTORS, sizes.generated_width),
        random(rows, TOKENS, sizes.prompt_width),
        torch.ones(rows, TOKENS, dtype=torch.int64),
    )
    latents = random(rows, sizes.num_channels, FRAMES, NUM_BINS).to(unet.device)
    return unet(latents, torch.tensor(TIMESTEPS).to(unet.device), text).float().cpu()


def _relative_rms(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).square().mean() / expected.square().mean()).sqrt())
