"""Text that is projected once and packed with other requests' does what the untouched UNet does with the raw text."""

import pytest
import torch
from text_conditioning import TextProjection, concatenate
from unet_forward import UNetForward

from tests.helpers.tiny_unet import CPU, make_forward, make_unet, reference_noise, relative_rms

TOLERANCE = 1e-5
PADDING_TOLERANCE = 2e-6
"""Rounding makes 7e-7 of difference; text or a mask that belong to another row make 1e-3 and more."""

UNETS = {
    "as the official one": {},
    "equal widths": {"cross_attention_dim": ((None, 16, 16),) * 4},
    "two layers per block": {"layers_per_block": 2},
    "two blocks per transformer": {"transformer_layers_per_block": 2},
}


def random_text(unet: UNetForward, rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 8, unet.sizes.generated_width, generator=generator),
        torch.randn(rows, tokens, unet.sizes.prompt_width, generator=generator),
    )


def random_latents(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(rows, 8, 16, 16, generator=generator), torch.linspace(999, 1, rows)


def mask_of(*tokens: int, total: int) -> torch.Tensor:
    return (torch.arange(total) < torch.tensor(tokens)[:, None]).long()


def row_errors(actual: torch.Tensor, expected: torch.Tensor) -> list[float]:
    assert actual.shape == expected.shape
    return [relative_rms(a, e) for a, e in zip(actual, expected, strict=True)]


def raw_output(unet, generated, prompt, mask):
    return reference_noise(unet, *random_latents(len(prompt)), generated, prompt, mask)


@pytest.mark.parametrize("changes", UNETS.values(), ids=UNETS.keys())
def test_projected_text_does_what_raw_text_does(changes):
    unet = UNetForward(make_unet(1, **changes), CPU, max_tokens=512)
    generated, prompt = random_text(unet, rows=3, tokens=7, seed=0)
    mask = mask_of(7, 4, 0, total=7)  # the last row's tokens are all masked: attention is then as if none were
    output = unet(*random_latents(3), unet.project(generated, prompt, mask))
    untouched = make_unet(1, **changes)
    expected = raw_output(untouched, generated, prompt, mask)
    assert max(row_errors(output, expected)) <= TOLERANCE
    # Each text and the mask matter: what is lost or exchanged would be seen above.
    for other in (
        (generated.roll(-1, 0), prompt, mask),
        (generated, prompt.roll(-1, 0), mask),
        (generated, prompt, mask.roll(-1, 0)),
    ):
        assert row_errors(raw_output(untouched, *other), expected)[0] > 100 * TOLERANCE


@pytest.mark.parametrize("tokens", [8, 16, 64])
def test_padding_changes_nothing_not_even_for_a_row_that_is_all_masked(tokens):
    unet = make_forward()
    conditioning = unet.project(*random_text(unet, rows=3, tokens=7, seed=0), mask_of(7, 4, 0, total=7))
    padded = conditioning.padded(tokens)
    assert padded.tokens == tokens
    alone = unet(*random_latents(3), conditioning)
    assert max(row_errors(unet(*random_latents(3), padded), alone)) <= PADDING_TOLERANCE


def test_a_row_does_not_depend_on_the_texts_that_share_its_batch():
    unet = make_forward()
    latents, timesteps = random_latents(4)
    parts = [
        unet.project(*random_text(unet, 1, 3, seed=1), mask_of(2, total=3)),
        unet.project(*random_text(unet, 2, 12, seed=2), mask_of(12, 0, total=12)),
        unet.project(*random_text(unet, 1, 7, seed=3), mask_of(7, total=7)),
    ]
    together = unet(latents, timesteps, concatenate(parts, tokens=16))
    spans = (slice(0, 1), slice(1, 3), slice(3, 4))
    solo = [unet(latents[span], timesteps[span], part) for span, part in zip(spans, parts, strict=True)]
    assert max(row_errors(together, torch.cat(solo))) <= PADDING_TOLERANCE


def test_rows_can_be_chosen_in_any_order():
    unet = make_forward()
    latents, timesteps = random_latents(3)
    conditioning = unet.project(*random_text(unet, rows=3, tokens=7, seed=0), mask_of(7, 4, 2, total=7))
    order = torch.tensor([2, 0, 2])
    chosen = unet(latents[order], timesteps[order], conditioning.rows(order))
    assert max(row_errors(chosen, unet(latents, timesteps, conditioning)[order])) <= TOLERANCE


@pytest.mark.parametrize("changes", UNETS.values(), ids=UNETS.keys())
def test_no_weights_are_held_twice(changes):
    unet = make_unet(**changes)
    before = sum(parameter.numel() for parameter in unet.parameters())
    projection = TextProjection(unet)
    moved = sum(parameter.numel() for parameter in projection.parameters())
    assert moved > 0
    assert sum(parameter.numel() for parameter in unet.parameters()) + moved == before
    # What is left in the UNet belongs to its self-attention, where keys come from as many channels as queries do.
    left = [module for name, module in unet.named_modules() if name.endswith((".to_k", ".to_v"))]
    assert {module.in_features for module in left} <= set(unet.config.block_out_channels)
