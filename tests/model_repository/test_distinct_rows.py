"""Layers before the text: equal rows are computed once, and what comes out is what diffusers gives."""

import pytest
import torch
from distinct_rows import DistinctRows
from unet_forward import UNetForward

from tests.helpers.tiny_unet import CPU, GENERATED_WIDTH, PROMPT_WIDTH, make_unet, reference_noise, relative_rms

TOLERANCE = 1e-5
TOKENS = 7
FIRST_LAYERS = ("down_blocks.0", "down_blocks.1.resnets.0", "down_blocks.1.attentions.0")
WITH_TEXT = "down_blocks.1.attentions.1"


class Rows:
    """Counts the rows that layers compute."""

    def __init__(self, unet) -> None:
        self.of: dict[str, int] = {}
        for name in (*FIRST_LAYERS, WITH_TEXT):
            layer = unet.get_submodule(name)
            layer.forward = self._counted(name, layer.forward)

    def _counted(self, name, forward):
        def counted(*inputs, **named):
            self.of[name] = len(inputs[0] if inputs else named["hidden_states"])
            return forward(*inputs, **named)

        return counted


def text(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(rows, 8, GENERATED_WIDTH, generator=generator),
        torch.randn(rows, TOKENS, PROMPT_WIDTH, generator=generator),
        torch.ones(rows, TOKENS, dtype=torch.int64),
    )


def rows_of(kinds: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and timesteps; a letter is a row's latents, and a capital has another timestep."""
    latents = {
        kind: torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(ord(kind))) for kind in set(kinds.lower())
    }
    return (
        torch.stack([latents[kind.lower()] for kind in kinds]),
        torch.tensor([900.0 if kind.isupper() else 500.0 for kind in kinds]),
    )


@pytest.mark.parametrize(
    ("kinds", "distinct"),
    [("a", 1), ("aa", 1), ("ab", 2), ("aA", 2), ("aabb", 2), ("abb", 2), ("aab", 2), ("aabBc", 4), ("aba", 3)],
)
def test_equal_neighbours_are_computed_once_and_give_what_diffusers_gives(kinds, distinct):
    unet = make_unet()
    rows = Rows(unet)
    forward = UNetForward(unet, CPU, max_tokens=512)
    latents, timesteps = rows_of(kinds)
    conditioning = text(len(kinds))
    output = forward(latents, timesteps, forward.project(*conditioning))
    assert [rows.of[name] for name in FIRST_LAYERS] == [distinct] * len(FIRST_LAYERS)
    assert rows.of[WITH_TEXT] == len(kinds)
    assert relative_rms(output, reference_noise(make_unet(), latents, timesteps, *conditioning)) <= TOLERANCE


def test_one_forward_knows_nothing_of_the_one_before():
    unet = make_unet()
    forward = UNetForward(unet, CPU, max_tokens=512)
    for kinds in ("aa", "ab", "aabb", "aa"):
        latents, timesteps = rows_of(kinds)
        conditioning = text(len(kinds))
        output = forward(latents, timesteps, forward.project(*conditioning))
        assert relative_rms(output, reference_noise(make_unet(), latents, timesteps, *conditioning)) <= TOLERANCE


def test_a_forward_that_fails_leaves_nothing_for_the_next():
    unet = make_unet()
    forward = UNetForward(unet, CPU, max_tokens=512)
    latents, timesteps = rows_of("aa")
    with pytest.raises(RuntimeError):
        forward(latents[:, :7], timesteps, forward.project(*text(2)))
    latents, timesteps = rows_of("abc")
    output = forward._eager(latents, timesteps, forward.project(*text(3)))
    assert relative_rms(output, reference_noise(make_unet(), latents, timesteps, *text(3))) <= TOLERANCE


def test_rows_that_are_not_numbers_are_not_equal():
    unet = make_unet()
    rows = Rows(unet)
    forward = UNetForward(unet, CPU, max_tokens=512)
    latents, timesteps = rows_of("aa")
    latents[:] = torch.nan
    forward(latents, timesteps, forward.project(*text(2)))
    assert rows.of[FIRST_LAYERS[0]] == 2


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({}, FIRST_LAYERS),
        ({"cross_attention_dim": ((GENERATED_WIDTH, PROMPT_WIDTH),) * 4}, FIRST_LAYERS[:2]),
        (
            {"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)},
            ("down_blocks.0.resnets.0", "down_blocks.0.attentions.0"),
        ),
    ],
    ids=["official", "every attention sees text", "attention on the first level"],
)
def test_what_comes_before_the_text_depends_on_the_configuration(changes, changed):
    unet = make_unet(**changes)
    DistinctRows(unet)
    assert {name for name, module in unet.named_modules() if "forward" in vars(module)} == set(changed)
