"""The two tokenizers of a checkpoint, with the padding and truncation of diffusers."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

SPECIAL_TOKENS = 3
"""CLAP's two at the ends; T5's one at the end, and its mark of a word's beginning before the text."""

CLAP_TOKENIZER_FILE = "clap_tokenizer.json"
T5_TOKENIZER_FILE = "t5_tokenizer.json"


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of the same rows by both tokenizers.

    Attributes:
        clap_input_ids: int64 [rows, clap_tokens].
        clap_attention_mask: int64 [rows, clap_tokens], 1 for a token and 0 for padding.
        t5_input_ids: int64 [rows, tokens].
        t5_attention_mask: int64 [rows, tokens].
        truncated_tokens: int32 [prompts], how many of T5's tokens of each prompt were cut off.
    """

    clap_input_ids: np.ndarray
    clap_attention_mask: np.ndarray
    t5_input_ids: np.ndarray
    t5_attention_mask: np.ndarray
    truncated_tokens: np.ndarray


class TextTokenizers:
    """CLAP's and T5's tokenizer. Not thread-safe: padding and truncation are settings of the tokenizers."""

    def __init__(self, folder: Path) -> None:
        self._clap = _load(folder / CLAP_TOKENIZER_FILE)
        self._t5 = _load(folder / T5_TOKENIZER_FILE)
        self._t5_truncation, self._t5_padding = dict(self._t5.truncation or {}), dict(self._t5.padding or {})
        self._max_tokens = max((self._clap.truncation or {})["max_length"], self._t5_truncation["max_length"])

    def tokenize(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None) -> TokenizedText:
        """Tokenize prompts, after the negative prompts if there are any.

        CLAP's rows are padded to the longest of them, where diffusers pads to 512: under the mask, the embeddings are
        the same. T5's padding is diffusers' own, because GPT-2 sees it: prompts are padded to the longest prompt, and
        negative prompts are cut and padded to that length.
        """
        texts = [*(negative_prompts or ()), *prompts]
        clap_input_ids, clap_attention_mask = _arrays(self._clap.encode_batch(texts))

        self._truncate_t5(self._t5_truncation["max_length"])
        encodings = self._t5_encodings(prompts, length=None)
        truncated_tokens = np.array([_num_truncated(encoding) for encoding in encodings], np.int32)
        if negative_prompts:
            num_tokens = len(encodings[0])
            self._truncate_t5(num_tokens)
            encodings = [*self._t5_encodings(negative_prompts, length=num_tokens), *encodings]
        return TokenizedText(clap_input_ids, clap_attention_mask, *_arrays(encodings), truncated_tokens)

    def most_tokens(self, texts: Sequence[str]) -> int:
        """Return how many tokens the longest of some texts has at most, without tokenizing them.

        A token of CLAP's stands for at least a byte, and one of T5's for at least a character of the normalized text.
        """
        limit = self._max_tokens
        sizes = (len(text) if text.isascii() else _most_characters(text[:limit]) for text in texts)
        return min(limit, max(sizes) + SPECIAL_TOKENS)

    def _truncate_t5(self, max_length: int) -> None:
        """Cut T5's texts to `max_length` tokens from now on, on the checkpoint's side."""
        self._t5.enable_truncation(**(self._t5_truncation | {"max_length": max_length}))

    def _t5_encodings(self, texts: Sequence[str], length: int | None) -> list[Encoding]:
        self._t5.enable_padding(**(self._t5_padding | {"length": length}))
        return self._t5.encode_batch(list(texts))


def _most_characters(text: str) -> int:
    return max(len(text.encode()), len(unicodedata.normalize("NFKC", text)))


def _load(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.truncation is None or tokenizer.padding is None:
        raise ValueError(f"{path} has no truncation and padding settings: run python -m export again.")
    return tokenizer


def _num_truncated(encoding: Encoding) -> int:
    return sum(piece.special_tokens_mask.count(0) for piece in encoding.overflowing)


def _arrays(encodings: Sequence[Encoding]) -> tuple[np.ndarray, np.ndarray]:
    input_ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
    attention_mask = np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64)
    return input_ids, attention_mask
