"""How the components of a checkpoint must fit together, and the keys of each one with each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.config_rules import Rule, check, integer
from export.errors import CheckpointError

Configs = Mapping[str, Mapping[str, Any]]
"""What `Schema.read` returned, by component."""

EQUAL_SIZES = (
    ("projection_model", "text_encoder_dim", "text_encoder", "projection_dim"),
    ("projection_model", "text_encoder_1_dim", "text_encoder_2", "d_model"),
    ("projection_model", "langauge_model_dim", "language_model", "n_embd"),  # diffusers spells it so
    ("unet", "in_channels", "vae", "latent_channels"),
    ("unet", "out_channels", "vae", "latent_channels"),
    ("feature_extractor", "feature_size", "text_encoder", "audio_config.num_mel_bins"),
)
"""Pairs of a component and a key in its configuration that have to be equal."""

NUM_SPECIAL_VECTORS = 5
"""What GPT-2 sees beside T5's states: CLAP's vector, and a start and an end vector around each of the two texts."""


@dataclass(frozen=True)
class Fit:
    """A rule for one key that depends on others.

    Attributes:
        component: Whose configuration has the key.
        key: With dots for sections.
        rule: Makes the rule.
    """

    component: str
    key: str
    rule: Callable[[Configs], Rule]


def _multiple_of(factor: int, why: str) -> Rule:
    return Rule(f"a multiple of {factor}, {why}", lambda value: value % factor == 0)


def _all_multiples_of(factor: int, why: str) -> Rule:
    return Rule(f"multiples of {factor}, {why}", lambda values: all(value % factor == 0 for value in values))


def _as_long_as(component: str, key: str) -> Callable[[Configs], Rule]:
    """Return a rule for lists with an item for each one of another key; what isn't a list holds for all of them."""

    def rule(configs: Configs) -> Rule:
        length = len(configs[component][key])
        return Rule(
            f"a list of {length}, as long as {key}",
            lambda value: not isinstance(value, list) or len(value) == length,
        )

    return rule


def _levels(component: str, *keys: str) -> tuple[Fit, ...]:
    return tuple(Fit(component, key, _as_long_as(component, "block_out_channels")) for key in keys)


def _groups(component: str) -> Fit:
    return Fit(
        component,
        "block_out_channels",
        lambda configs: _all_multiples_of(configs[component]["norm_num_groups"], "which is norm_num_groups"),
    )


def _num_positions(configs: Configs) -> Rule:
    tokens, vectors = configs["tokenizer_2"]["model_max_length"], configs["language_model"]["max_new_tokens"]
    return integer(
        tokens + NUM_SPECIAL_VECTORS + vectors - 1,
        why=f", for prompts of {tokens} tokens, {NUM_SPECIAL_VECTORS} vectors beside them and max_new_tokens {vectors}",
    )


def _clap_positions(configs: Configs) -> Rule:
    tokens = configs["tokenizer"]["model_max_length"]
    padding = configs["text_encoder"]["text_config"]["pad_token_id"]
    return integer(
        tokens + padding + 1,
        why=f", for prompts of {tokens} tokens, whose positions start after pad_token_id {padding}",
    )


def _clap_frames(configs: Configs) -> Rule:
    audio, extractor = configs["text_encoder"]["audio_config"], configs["feature_extractor"]
    frames = audio["spec_size"] * (audio["spec_size"] // audio["num_mel_bins"])
    length = (frames - 1) * extractor["hop_length"] / extractor["sampling_rate"]
    return Rule(
        f"at most {length:.3g}, since the audio tower takes {frames} frames of hop_length {extractor['hop_length']}",
        lambda seconds: seconds * extractor["sampling_rate"] // extractor["hop_length"] + 1 <= frames,
    )


def _clap_bins(configs: Configs) -> Rule:
    size = configs["text_encoder"]["audio_config"]["spec_size"]
    return Rule(f"a divisor of spec_size, {size}", lambda bins: size % bins == 0)


def _t5_distance(configs: Configs) -> Rule:
    return integer(
        configs["text_encoder_2"]["relative_attention_num_buckets"] // 4 + 1,
        why=", more than a quarter of relative_attention_num_buckets",
    )


def _kernels(configs: Configs) -> Rule:
    rates = configs["vocoder"]["upsample_rates"]
    return Rule(
        f"{len(rates)} sizes, none of them below its rate in upsample_rates, {rates}",
        lambda kernels: (
            len(kernels) == len(rates) and all(kernel >= rate for kernel, rate in zip(kernels, rates, strict=True))
        ),
    )


FITS = (
    *_levels("unet", "down_block_types", "up_block_types", "only_cross_attention", "layers_per_block"),
    *_levels("unet", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim"),
    *_levels("vae", "down_block_types", "up_block_types"),
    _groups("unet"),
    _groups("vae"),
    Fit(
        "vocoder",
        "model_in_dim",
        lambda configs: _multiple_of(
            2 ** (len(configs["vae"]["block_out_channels"]) - 1), "by which the VAE shrinks spectrograms"
        ),
    ),
    Fit("vocoder", "upsample_kernel_sizes", _kernels),
    Fit("vocoder", "resblock_dilation_sizes", _as_long_as("vocoder", "resblock_kernel_sizes")),
    Fit(
        "vocoder",
        "upsample_initial_channel",
        lambda configs: integer(2 ** len(configs["vocoder"]["upsample_rates"]), why=": each upsampling halves it"),
    ),
    Fit(
        "language_model",
        "n_embd",
        lambda configs: _multiple_of(configs["language_model"]["n_head"], "which is n_head"),
    ),
    Fit("language_model", "n_positions", _num_positions),
    Fit("text_encoder_2", "relative_attention_max_distance", _t5_distance),
    Fit(
        "text_encoder",
        "text_config.hidden_size",
        lambda configs: _multiple_of(
            configs["text_encoder"]["text_config"]["num_attention_heads"], "which is num_attention_heads"
        ),
    ),
    Fit("text_encoder", "text_config.max_position_embeddings", _clap_positions),
    Fit("text_encoder", "audio_config.num_mel_bins", _clap_bins),
    Fit("feature_extractor", "max_length_s", _clap_frames),
)
"""In the order in which they are checked."""


def check_sizes(configs: Configs, path: Callable[[str], Path]) -> None:
    """Raise CheckpointError unless each component takes what the one before it gives.

    Args:
        configs: Each component's configuration, checked by itself, with defaults.
        path: Tells where a component's configuration is from.
    """
    for component, key, other, other_key in EQUAL_SIZES:
        size, other_size = _get(configs, component, key), _get(configs, other, other_key)
        if size != other_size:
            raise CheckpointError(
                f"{key} in {path(component)} is {size}, but {other_key} in {path(other)} is {other_size}: they must be "
                f"equal."
            )
    for fit in FITS:
        check(fit.key, _get(configs, fit.component, fit.key), fit.rule(configs), path(fit.component))
    _check_cross_attention(configs, path("unet"))


def _get(configs: Configs, component: str, key: str) -> Any:
    value: Any = configs[component]
    for name in key.split("."):
        value = value[name]
    return value


def _check_cross_attention(configs: Configs, path: Path) -> None:
    """Check which widths the UNet attends to.

    It gives GPT-2's vectors to the first two layers of a level, T5's states to further ones; null stands for neither.
    """
    unet = configs["unet"]
    gpt2_width, t5_width = configs["language_model"]["n_embd"], configs["text_encoder_2"]["d_model"]
    levels = [_listed(level) for level in _per_level(unet["cross_attention_dim"], len(unet["block_out_channels"]))]
    for widths in levels:
        expected = [gpt2_width, gpt2_width, *[t5_width] * len(widths)][: len(widths)]
        if any(width not in (None, fit) for width, fit in zip(widths, expected, strict=True)):
            raise CheckpointError(
                f"cross_attention_dim in {path} has {widths}: with this language_model and text_encoder_2, each must "
                f"be null or as in {expected}."
            )
    attending = [level for index, level in enumerate(levels) if _attends(unet, index)]
    example = [[None, gpt2_width, t5_width]] * len(levels)
    for text, positions in {"GPT-2's vectors": slice(0, 2), "T5's states": slice(2, None)}.items():
        if not any(width is not None for level in attending for width in level[positions]):
            rule = Rule(f"a list with a width for {text} on a level with attention, such as {example}", lambda _: False)
            check("cross_attention_dim", unet["cross_attention_dim"], rule, path)


def _attends(unet: Mapping[str, Any], level: int) -> bool:
    """Tell whether a level has attention on its way down or up; the deepest one always has, between the two."""
    deepest = level == len(unet["block_out_channels"]) - 1
    return deepest or "CrossAttn" in unet["down_block_types"][level] + unet["up_block_types"][-1 - level]


def _per_level(value: Any, num_levels: int) -> list[Any]:
    return value if isinstance(value, list) else [value] * num_levels


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
