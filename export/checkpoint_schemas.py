"""Every key of a checkpoint's configurations that reaches the computation, with what is supported.

One table for each component. The keys and their defaults are those of diffusers' and transformers' own classes, which a
test compares; what is supported has been run against these classes. How components must fit together is in
`checkpoint_sizes`.
"""

from collections.abc import Mapping

from export.config_rules import (
    BOOLEAN,
    NUMBER,
    ODD,
    OWN_DEFAULT,
    POSITIVE,
    POSITIVE_NUMBER,
    Key,
    Rule,
    Schema,
    integer,
    list_of,
    nullable,
    one_of,
    only,
    single_or_list,
)

MAX_TEXT_TOKENS = 512
"""Of a prompt: CLAP's text tower has 512 positions, and so many T5 states are what the model `unet` takes."""

MODEL_INDEX = "model_index.json"

CONFIG_FILES = {
    "feature_extractor": "preprocessor_config.json",
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}
"""Where a configuration isn't named config.json."""

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverSDEScheduler",
    "EDMEulerScheduler",
)
"""`diffusers.schedulers.KarrasDiffusionSchedulers`, which is what the pipeline takes."""

COMPONENT_CLASSES: dict[str, tuple[str, ...]] = {
    "text_encoder": ("ClapModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "tokenizer": ("RobertaTokenizer", "RobertaTokenizerFast"),
    "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
    "feature_extractor": ("ClapFeatureExtractor",),
    "projection_model": ("AudioLDM2ProjectionModel",),
    "language_model": ("GPT2Model", "GPT2LMHeadModel"),
    "unet": ("AudioLDM2UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "vocoder": ("SpeechT5HifiGan",),
    "scheduler": SCHEDULERS,
}
"""The classes that each entry of `model_index.json` may name. Nothing else is ever imported, whatever the file says."""

MODELS = {
    "text_encoder": "transformers",
    "text_encoder_2": "transformers",
    "projection_model": "diffusers",
    "language_model": "transformers",
    "unet": "diffusers",
    "vae": "diffusers",
    "vocoder": "transformers",
}
"""The components that have weights, and the library of their classes."""

_HIDDEN_ACTIVATION = one_of(
    "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "sigmoid", "silu", "swish", "tanh"
)
_DIFFUSERS_ACTIVATION = one_of("gelu", "mish", "relu", "silu", "swish")

_WIDTHS = Rule(
    "a width, or a list of up to 4 widths and nulls",
    lambda value: POSITIVE.accepts(value) or (list_of(nullable(POSITIVE)).accepts(value) and len(value) <= 4),
)
_CROSS_ATTENTION = Rule(
    f"a width, or a list with, for each level, {_WIDTHS.description}",
    lambda value: POSITIVE.accepts(value) or list_of(_WIDTHS).accepts(value),
)

_SHARED_BY_TRANSFORMERS = frozenset(
    {
        "transformers_version",
        "architectures",
        "output_hidden_states",
        "return_dict",
        "dtype",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "id2label",
        "label2id",
        "problem_type",
    }
)

_CLAP_TEXT = Schema(
    keys={
        "vocab_size": Key(POSITIVE, 50265),
        "hidden_size": Key(POSITIVE, 768),
        "num_hidden_layers": Key(POSITIVE, 12),
        "num_attention_heads": Key(POSITIVE, 12),
        "intermediate_size": Key(POSITIVE, 3072),
        "hidden_act": Key(_HIDDEN_ACTIVATION, "gelu"),
        "max_position_embeddings": Key(POSITIVE, 514),
        "type_vocab_size": Key(POSITIVE, 1),
        "layer_norm_eps": Key(POSITIVE_NUMBER, 1e-12),
        "pad_token_id": Key(integer(0), 1),
    },
    # The projection's are overwritten by those of the whole model.
    harmless=_SHARED_BY_TRANSFORMERS
    | {"projection_dim", "projection_hidden_act", "bos_token_id", "eos_token_id", "initializer_factor"}
    | {"hidden_dropout_prob", "attention_probs_dropout_prob"},
)

_CLAP_AUDIO = Schema(
    keys={
        "window_size": Key(POSITIVE, 8),
        "num_mel_bins": Key(POSITIVE, 64),
        "spec_size": Key(POSITIVE, 256),
        "hidden_act": Key(_HIDDEN_ACTIVATION, "gelu"),
        "patch_size": Key(POSITIVE, 4),
        "patch_stride": Key(list_of(POSITIVE, length=2), [4, 4]),
        "hidden_size": Key(POSITIVE, 768),
        "depths": Key(list_of(POSITIVE), [2, 2, 6, 2]),
        "num_attention_heads": Key(list_of(POSITIVE), [4, 8, 16, 32]),
        "enable_fusion": Key(only(False, ": features of several crops are not fused"), False),
        "patch_embed_input_channels": Key(only(1), 1),
        "flatten_patch_embeds": Key(only(True), True),
        "patch_embeds_hidden_size": Key(POSITIVE, 96),
        "enable_patch_layer_norm": Key(BOOLEAN, True),
        "qkv_bias": Key(BOOLEAN, True),
        "mlp_ratio": Key(POSITIVE_NUMBER, 4.0),
        "layer_norm_eps": Key(POSITIVE_NUMBER, 1e-5),
    },
    harmless=_SHARED_BY_TRANSFORMERS
    | {"num_classes", "fusion_type", "aff_block_r", "num_hidden_layers", "projection_dim", "projection_hidden_act"}
    | {"hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_factor"},
)

_TOKENIZER = {
    "model_max_length": Key(integer(3, MAX_TEXT_TOKENS, ", to which prompts are cut")),
    "truncation_side": Key(one_of("left", "right"), "right"),
    "pad_token": Key(
        Rule("a token", lambda value: isinstance(value, str) or (isinstance(value, dict) and "content" in value)),
        "<pad>",
    ),
    "split_special_tokens": Key(only(False), False),
    "model_input_names": Key(
        Rule("a list with attention_mask in it", lambda value: isinstance(value, list) and "attention_mask" in value),
        ["input_ids", "attention_mask"],
    ),
}

SCHEMAS: Mapping[str, Schema] = {
    "text_encoder": Schema(
        keys={
            "projection_dim": Key(POSITIVE, 512),
            "projection_hidden_act": Key(_HIDDEN_ACTIVATION, "relu"),
        },
        # `score_waveforms` sorts by logits, and a positive factor changes no order.
        harmless=_SHARED_BY_TRANSFORMERS | {"logit_scale_init_value", "initializer_factor"},
        sections={"text_config": _CLAP_TEXT, "audio_config": _CLAP_AUDIO},
    ),
    "text_encoder_2": Schema(
        keys={
            "vocab_size": Key(POSITIVE, 32128),
            "d_model": Key(POSITIVE, 512),
            "d_kv": Key(POSITIVE, 64),
            "d_ff": Key(POSITIVE, 2048),
            "num_layers": Key(POSITIVE, 6),
            "num_heads": Key(POSITIVE, 8),
            "relative_attention_num_buckets": Key(integer(4), 32),
            "relative_attention_max_distance": Key(POSITIVE, 128),
            "layer_norm_epsilon": Key(POSITIVE_NUMBER, 1e-6),
            "feed_forward_proj": Key(
                one_of("relu", "gelu", "silu", "gated-relu", "gated-gelu", "gated-silu"),
                "relu",
            ),
            "is_decoder": Key(only(False), False),
        },
        harmless=_SHARED_BY_TRANSFORMERS
        | {"num_decoder_layers", "dropout_rate", "classifier_dropout", "initializer_factor", "use_cache"}
        | {"pad_token_id", "eos_token_id"},
        aliases={
            "hidden_size": "d_model",
            "num_attention_heads": "num_heads",
            "num_hidden_layers": "num_layers",
            "head_dim": "d_kv",
        },
    ),
    "tokenizer": Schema(
        # CLAP takes the first token's state for the whole text: padding must not come before it.
        keys=_TOKENIZER | {"padding_side": Key(only("right"), "right")},
        aliases={"max_len": "model_max_length"},
    ),
    "tokenizer_2": Schema(
        keys=_TOKENIZER | {"padding_side": Key(one_of("left", "right"), "right")},
        aliases={"max_len": "model_max_length"},
    ),
    "feature_extractor": Schema(
        keys={
            "feature_size": Key(POSITIVE, 64),
            "sampling_rate": Key(POSITIVE, 48_000),
            "hop_length": Key(POSITIVE, 480),
            "max_length_s": Key(POSITIVE, 10),
            "fft_window_size": Key(integer(2), 1024),
            "frequency_min": Key(Rule("a number of at least 0", lambda value: NUMBER.accepts(value) and value >= 0), 0),
            "frequency_max": Key(POSITIVE_NUMBER, 14_000),
            "truncation": Key(only("rand_trunc", ": features of several crops are not fused"), "fusion"),
            "padding": Key(one_of("pad", "repeat", "repeatpad"), "repeatpad"),
        },
        # nb_max_samples and nb_frequency_bins are computed from the others, whatever the file says.
        harmless=frozenset({"padding_value", "return_attention_mask", "top_db"}),
    ),
    "projection_model": Schema(
        keys={
            "text_encoder_dim": Key(POSITIVE),
            "text_encoder_1_dim": Key(POSITIVE),
            "langauge_model_dim": Key(POSITIVE),  # diffusers spells it so
            "use_learned_position_embedding": Key(only(None, ": it is for speech, which isn't supported yet"), None),
        },
        harmless=frozenset({"max_seq_length"}),  # of the learned position embedding
    ),
    "language_model": Schema(
        keys={
            "vocab_size": Key(POSITIVE, 50257),
            "n_positions": Key(POSITIVE, 1024),
            "n_embd": Key(POSITIVE, 768),
            "n_layer": Key(POSITIVE, 12),
            "n_head": Key(POSITIVE, 12),
            "n_inner": Key(nullable(POSITIVE), None),
            "activation_function": Key(_HIDDEN_ACTIVATION, "gelu_new"),
            "layer_norm_epsilon": Key(POSITIVE_NUMBER, 1e-5),
            "scale_attn_weights": Key(BOOLEAN, True),
            "scale_attn_by_inverse_layer_idx": Key(BOOLEAN, False),
            "add_cross_attention": Key(BOOLEAN, False),
            "max_new_tokens": Key(POSITIVE),  # AudioLDM 2's own: how many vectors the UNet attends to
        },
        harmless=_SHARED_BY_TRANSFORMERS
        | {"resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range", "use_cache", "tie_word_embeddings"}
        | {"summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"}
        | {"bos_token_id", "eos_token_id", "pad_token_id", "reorder_and_upcast_attn"},
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
    ),
    "unet": Schema(
        keys={
            "sample_size": Key(integer(1, why=": the default length of the audio follows from it"), None),
            "in_channels": Key(POSITIVE, 4),
            "out_channels": Key(POSITIVE, 4),
            "flip_sin_to_cos": Key(BOOLEAN, True),
            "freq_shift": Key(integer(0, 1), 0),
            "down_block_types": Key(
                list_of(one_of("DownBlock2D", "CrossAttnDownBlock2D")),
                ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            ),
            "mid_block_type": Key(only("UNetMidBlock2DCrossAttn"), "UNetMidBlock2DCrossAttn"),
            "up_block_types": Key(
                list_of(one_of("UpBlock2D", "CrossAttnUpBlock2D")),
                ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            ),
            "only_cross_attention": Key(single_or_list(BOOLEAN), False),
            "block_out_channels": Key(list_of(POSITIVE), [320, 640, 1280, 1280]),
            "layers_per_block": Key(single_or_list(POSITIVE), 2),
            "downsample_padding": Key(integer(0, 1), 1),
            "mid_block_scale_factor": Key(POSITIVE_NUMBER, 1),
            "act_fn": Key(_DIFFUSERS_ACTIVATION, "silu"),
            "norm_num_groups": Key(POSITIVE, 32),
            "norm_eps": Key(POSITIVE_NUMBER, 1e-5),
            "cross_attention_dim": Key(_CROSS_ATTENTION, 1280),
            "transformer_layers_per_block": Key(single_or_list(POSITIVE), 1),
            "attention_head_dim": Key(single_or_list(POSITIVE), 8),
            "num_attention_heads": Key(only(None, ": diffusers takes attention_head_dim for it"), None),
            "use_linear_projection": Key(BOOLEAN, False),
            "class_embed_type": Key(only(None, ": the pipeline gives no class"), None),
            "num_class_embeds": Key(only(None, ": the pipeline gives no class"), None),
            "upcast_attention": Key(BOOLEAN, False),
            "resnet_time_scale_shift": Key(one_of("default", "scale_shift"), "default"),
            "time_embedding_type": Key(only("positional"), "positional"),
            "time_embedding_dim": Key(nullable(POSITIVE), None),
            "time_embedding_act_fn": Key(nullable(_DIFFUSERS_ACTIVATION), None),
            "timestep_post_act": Key(nullable(_DIFFUSERS_ACTIVATION), None),
            "time_cond_proj_dim": Key(nullable(POSITIVE), None),
            "conv_in_kernel": Key(ODD, 3),
            "conv_out_kernel": Key(ODD, 3),
            "class_embeddings_concat": Key(only(False, ": the pipeline gives no class"), False),
        },
        harmless=frozenset({"projection_class_embeddings_input_dim"}),  # of classes
    ),
    "vae": Schema(
        keys={
            "in_channels": Key(POSITIVE, 3),
            "out_channels": Key(only(1, ", a spectrogram"), 3),
            "down_block_types": Key(
                list_of(one_of("DownEncoderBlock2D", "AttnDownEncoderBlock2D")), ["DownEncoderBlock2D"]
            ),
            "up_block_types": Key(list_of(one_of("UpDecoderBlock2D", "AttnUpDecoderBlock2D")), ["UpDecoderBlock2D"]),
            "block_out_channels": Key(list_of(POSITIVE), [64]),
            "layers_per_block": Key(POSITIVE, 1),
            "act_fn": Key(_DIFFUSERS_ACTIVATION, "silu"),
            "latent_channels": Key(POSITIVE, 4),
            "norm_num_groups": Key(POSITIVE, 32),
            "scaling_factor": Key(POSITIVE_NUMBER, 0.18215),
            "use_quant_conv": Key(BOOLEAN, True),
            "use_post_quant_conv": Key(BOOLEAN, True),
            "mid_block_add_attention": Key(BOOLEAN, True),
        },
        # AudioLDM2Pipeline divides by scaling_factor and does nothing else.
        harmless=frozenset({"sample_size", "shift_factor", "latents_mean", "latents_std", "force_upcast"}),
    ),
    "vocoder": Schema(
        keys={
            "model_in_dim": Key(POSITIVE, 80),
            "sampling_rate": Key(POSITIVE, 16_000),
            "upsample_initial_channel": Key(POSITIVE, 512),
            "upsample_rates": Key(list_of(POSITIVE), [4, 4, 4, 4]),
            "upsample_kernel_sizes": Key(list_of(POSITIVE), [8, 8, 8, 8]),
            "resblock_kernel_sizes": Key(list_of(ODD), [3, 7, 11]),
            "resblock_dilation_sizes": Key(list_of(list_of(POSITIVE)), [[1, 3, 5], [1, 3, 5], [1, 3, 5]]),
            "leaky_relu_slope": Key(NUMBER, 0.1),
            "normalize_before": Key(BOOLEAN, True),
        },
        harmless=_SHARED_BY_TRANSFORMERS | {"initializer_range"},
    ),
    # Each class has keys of its own beside these. They are tried: see `check_schedulers`.
    "scheduler": Schema(
        keys={
            "num_train_timesteps": Key(integer(1, 1_000_000), OWN_DEFAULT),
            "beta_start": Key(POSITIVE_NUMBER, OWN_DEFAULT),
            "beta_end": Key(POSITIVE_NUMBER, OWN_DEFAULT),
            "beta_schedule": Key(one_of("linear", "scaled_linear", "squaredcos_cap_v2"), OWN_DEFAULT),
            "trained_betas": Key(nullable(list_of(POSITIVE_NUMBER)), OWN_DEFAULT),
            "prediction_type": Key(one_of("epsilon", "sample", "v_prediction"), OWN_DEFAULT),
            "timestep_spacing": Key(one_of("leading", "linspace", "trailing"), OWN_DEFAULT),
            "steps_offset": Key(integer(0), OWN_DEFAULT),
            "clip_sample": Key(BOOLEAN, OWN_DEFAULT),
            "clip_sample_range": Key(POSITIVE_NUMBER, OWN_DEFAULT),
            "set_alpha_to_one": Key(BOOLEAN, OWN_DEFAULT),
            "thresholding": Key(BOOLEAN, OWN_DEFAULT),
            "rescale_betas_zero_snr": Key(BOOLEAN, OWN_DEFAULT),
        }
    ),
}
