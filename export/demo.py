"""Makes an AudioLDM 2 checkpoint with seeded random weights, in the layout that the hub's checkpoints have.

`python -m export.demo --output DIR` writes about 15 million parameters in the official geometry: 256 x 16 latents for
10.24 s, 64 mel bins, 16 kHz. `--size full` writes the official widths (1.1 billion parameters, 4.5 GB), for benchmarks.
The audio it makes is noise; what it is good for is to run every stage, and to compare results.
"""

import argparse
import json
import math
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AudioLDM2ProjectionModel,
    AutoencoderKL,
)
from safetensors import safe_open
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from export.checkpoint_schemas import MAX_TEXT_TOKENS, MODEL_INDEX
from export.demo_text import SENTENCES
from export.demo_unet import TEXT_WIDTHS, UNET_WIDTHS, make_scheduler, make_unet

WIDTHS: dict[str, dict[str, Any]] = {
    "demo": {
        "vocabulary": 512,
        "clap_text": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
        "clap_audio": {
            "patch_embeds_hidden_size": 16,
            "hidden_size": 128,
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 8],
        },
        "clap_projection": 64,
        "t5": {"d_model": TEXT_WIDTHS["demo"][1], "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4},
        "gpt2": {"n_embd": TEXT_WIDTHS["demo"][0], "n_layer": 2, "n_head": 4},
        "unet": UNET_WIDTHS["demo"],
        "vae": {"block_out_channels": (32, 64, 96), "layers_per_block": 1},
        "vocoder": {"upsample_initial_channel": 256},
    },
    "full": {
        "vocabulary": 50_265,
        "clap_text": {},
        "clap_audio": {},
        "clap_projection": 512,
        "t5": {"d_model": TEXT_WIDTHS["full"][1], "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
        "gpt2": {"n_embd": TEXT_WIDTHS["full"][0], "n_layer": 12, "n_head": 12},
        "unet": UNET_WIDTHS["full"],
        "vae": {"block_out_channels": (128, 256, 512), "layers_per_block": 2},
        "vocoder": {"upsample_initial_channel": 1024},
    },
}
"""Layer widths. Where `full` is empty, the configuration class's own defaults are the official ones."""


def write_checkpoint(output: Path, *, size: str = "demo", seed: int = 0, language_model: str = "GPT2Model") -> None:
    """Write a complete checkpoint into the folder `output`, which is made if it doesn't exist.

    Args:
        output: Where `model_index.json` and the component folders go.
        size: A key of WIDTHS: `demo` (about 15 M parameters) or `full` (about 1.1 billion).
        seed: Equal seeds give equal weights.
        language_model: `GPT2Model`, as the hub's checkpoints name it, or `GPT2LMHeadModel`, as diffusers wants it. The
            weights are the same.
    """
    torch.manual_seed(seed)
    components = _components(WIDTHS[size], language_model)
    output.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"_class_name": "AudioLDM2Pipeline", "_diffusers_version": diffusers.__version__}
    for name, component in components.items():
        component.save_pretrained(output / name)
        index[name] = [_library(component), type(component).__name__]
    (output / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def count_parameters(checkpoint: Path) -> int:
    """Return how many numbers the checkpoint's safetensors files hold."""
    total = 0
    for file in checkpoint.glob("*/*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return total


def _components(widths: dict[str, Any], language_model: str) -> dict[str, Any]:
    components: dict[str, Any] = {
        "tokenizer": _clap_tokenizer(),
        "tokenizer_2": _t5_tokenizer(),
        "feature_extractor": ClapFeatureExtractor(truncation="rand_trunc"),
        "text_encoder": _clap(widths),
        "text_encoder_2": _t5(widths),
        "projection_model": AudioLDM2ProjectionModel(
            text_encoder_dim=widths["clap_projection"],
            text_encoder_1_dim=widths["t5"]["d_model"],
            langauge_model_dim=widths["gpt2"]["n_embd"],
        ),
        "language_model": _gpt2(widths, language_model),
        "unet": make_unet(widths["gpt2"]["n_embd"], widths["t5"]["d_model"], **widths["unet"]),
        "scheduler": make_scheduler(),
        "vae": _vae(widths),
        "vocoder": _vocoder(widths),
    }
    for component in components.values():
        if isinstance(component, nn.Module):
            component.eval()
    return components


def _clap_tokenizer() -> RobertaTokenizer:
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        SENTENCES, vocab_size=512, min_frequency=2, special_tokens=special_tokens, show_progress=False
    )
    model = json.loads(trained.to_str())["model"]
    return RobertaTokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], model_max_length=MAX_TEXT_TOKENS
    )


def _t5_tokenizer() -> T5Tokenizer:
    """Build a unigram model of whole words and single letters, scored by how often they occur."""
    words = Counter("\N{LOWER ONE EIGHTH BLOCK}" + word for sentence in SENTENCES for word in sentence.split())
    letters = Counter("".join(words)) + Counter(string.printable.strip())
    total = words.total() + letters.total()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, math.log(count / total)) for piece, count in sorted((letters | words).items())]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TEXT_TOKENS)


def _clap(widths: dict[str, Any]) -> ClapModel:
    shared = {"projection_dim": widths["clap_projection"]}
    text = {"vocab_size": widths["vocabulary"], "max_position_embeddings": MAX_TEXT_TOKENS + 2}
    config = ClapConfig(
        text_config=text | shared | widths["clap_text"], audio_config=shared | widths["clap_audio"], **shared
    )
    return ClapModel(config)


def _t5(widths: dict[str, Any]) -> T5EncoderModel:
    vocabulary = min(widths["vocabulary"], 32_128)
    return T5EncoderModel(T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **widths["t5"]))


def _gpt2(widths: dict[str, Any], language_model: str) -> GPT2LMHeadModel | GPT2Model:
    """Return a GPT-2 that generates 8 vectors; `max_new_tokens` in its configuration is AudioLDM 2's own addition."""
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=widths["vocabulary"], bos_token_id=0, eos_token_id=0, **widths["gpt2"])
    )
    model.config.max_new_tokens = 8
    return model if language_model == "GPT2LMHeadModel" else model.transformer


def _vae(widths: dict[str, Any]) -> AutoencoderKL:
    levels = len(widths["vae"]["block_out_channels"])
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=8,
        sample_size=1024,
        scaling_factor=0.4110932946205139,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **widths["vae"],
    )


def _vocoder(widths: dict[str, Any]) -> SpeechT5HifiGan:
    official = {
        "model_in_dim": 64,
        "sampling_rate": 16_000,
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4, 4],
        "normalize_before": False,
    }
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(**official | widths["vocoder"]))
    make_audible(vocoder)
    return vocoder


@torch.no_grad()
def make_audible(vocoder: SpeechT5HifiGan) -> None:
    """Rescale a freshly initialised vocoder layer by layer, so that its audio is far from zero (it would be 1e-9)."""
    layers = [layer for layer in vocoder.modules() if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d))]
    hooks = [layer.register_forward_hook(_scale_to_unit_variance) for layer in layers]
    vocoder(torch.randn(1, 64, vocoder.config.model_in_dim))
    for hook in hooks:
        hook.remove()
    vocoder.conv_post.weight.mul_(0.3)


def _scale_to_unit_variance(layer: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
    deviation = output.std()
    layer.weight.div_(deviation)
    return output / deviation


def _library(component: Any) -> str:
    return str(type(component).__module__).partition(".")[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m export.demo", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--size", choices=sorted(WIDTHS), default="demo", help="small widths, or the official ones")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal weights (default: %(default)s)")
    parser.add_argument("--language-model", choices=["GPT2Model", "GPT2LMHeadModel"], default="GPT2Model")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    write_checkpoint(options.output, size=options.size, seed=options.seed, language_model=options.language_model)
    print(f"{options.output}: {count_parameters(options.output) / 1e6:.1f} M parameters, seed {options.seed}")


if __name__ == "__main__":
    main()
