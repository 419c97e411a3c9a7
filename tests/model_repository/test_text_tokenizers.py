"""Token ids against the tokenizers of transformers, called as diffusers' pipeline calls them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tokenizers import TextTokenizers
from transformers import RobertaTokenizer, T5Tokenizer

PROMPTS = ["a dog barking in the rain", "techno, strong and upbeat: Zürich 東京 \N{DOG FACE}"]


@pytest.fixture(scope="session")
def tokenizers(exported_repository) -> TextTokenizers:
    return TextTokenizers(exported_repository / "tokenizer" / "1")


@pytest.fixture(scope="session")
def t5(demo_checkpoint) -> T5Tokenizer:
    return T5Tokenizer.from_pretrained(demo_checkpoint / "tokenizer_2")


@pytest.fixture(scope="session")
def clap(demo_checkpoint) -> RobertaTokenizer:
    return RobertaTokenizer.from_pretrained(demo_checkpoint / "tokenizer")


def t5_reference(t5, texts, **padding) -> tuple[np.ndarray, np.ndarray]:
    encoded = t5(texts, truncation=True, return_tensors="np", **padding)
    return encoded.input_ids, encoded.attention_mask


def test_prompts_are_padded_to_the_longest(tokenizers, t5):
    tokens = tokenizers.tokenize(PROMPTS, None)
    input_ids, mask = t5_reference(t5, PROMPTS, padding=True, max_length=t5.model_max_length)
    np.testing.assert_array_equal(tokens.t5_input_ids, input_ids)
    np.testing.assert_array_equal(tokens.t5_attention_mask, mask)


@pytest.mark.parametrize(
    "negative", ["", "low", "a negative prompt that is much longer than either of the prompts " * 3]
)
def test_negative_prompts_come_first_cut_and_padded_to_the_prompts_length(tokenizers, t5, negative):
    tokens = tokenizers.tokenize(PROMPTS, [negative] * 2)
    num_tokens = tokens.t5_input_ids.shape[1]
    input_ids, mask = t5_reference(t5, [negative] * 2, padding="max_length", max_length=num_tokens)
    np.testing.assert_array_equal(tokens.t5_input_ids[:2], input_ids)
    np.testing.assert_array_equal(tokens.t5_attention_mask[:2], mask)
    np.testing.assert_array_equal(tokens.t5_input_ids[2:], tokenizers.tokenize(PROMPTS, None).t5_input_ids)


def test_clap_rows_are_those_of_512_tokens_without_their_padding(tokenizers, clap):
    tokens = tokenizers.tokenize(PROMPTS, ["low quality", ""])
    full = clap(
        ["low quality", "", *PROMPTS], padding="max_length", max_length=512, truncation=True, return_tensors="np"
    )
    num_tokens = tokens.clap_input_ids.shape[1]
    assert num_tokens == full.attention_mask.sum(1).max()
    np.testing.assert_array_equal(tokens.clap_input_ids, full.input_ids[:, :num_tokens])
    np.testing.assert_array_equal(tokens.clap_attention_mask, full.attention_mask[:, :num_tokens])


def test_long_prompts_are_cut_to_512_tokens(tokenizers, t5, clap):
    text = "a dog barking in the rain " * 200
    tokens = tokenizers.tokenize([text], None)
    assert tokens.t5_input_ids.shape == tokens.clap_input_ids.shape == (1, 512)
    np.testing.assert_array_equal(tokens.t5_input_ids, t5_reference(t5, [text], max_length=512)[0])
    np.testing.assert_array_equal(tokens.clap_input_ids[0], clap(text, truncation=True, max_length=512).input_ids)


def test_the_tokens_that_were_cut_are_counted(tokenizers, t5):
    text = "a dog barking in the rain " * 200
    num_tokens = len(t5(text, verbose=False).input_ids)
    assert tokenizers.tokenize([text, "a cat"], ["b " * 2000] * 2).truncated_tokens.tolist() == [num_tokens - 512, 0]


def test_one_request_leaves_no_trace_in_the_next(tokenizers):
    alone = tokenizers.tokenize(["a cat"], None)
    tokenizers.tokenize(PROMPTS, ["a"] * 2)
    again = tokenizers.tokenize(["a cat"], None)
    np.testing.assert_array_equal(again.t5_input_ids, alone.t5_input_ids)
    np.testing.assert_array_equal(again.clap_input_ids, alone.clap_input_ids)


@settings(deadline=None, max_examples=100)
@given(text=st.text(min_size=1, max_size=200))
def test_any_text_gives_the_ids_of_transformers(tokenizers, t5, text):
    tokens = tokenizers.tokenize([text], None)
    np.testing.assert_array_equal(tokens.t5_input_ids, t5_reference(t5, [text], max_length=512)[0])


@settings(deadline=None, max_examples=200)
@given(
    texts=st.lists(
        st.text(max_size=60) | st.sampled_from(["\ufdfa" * 40, "a " * 300, "ﬃ" * 9, "\u0300" * 30]), min_size=1
    )
)
def test_no_text_has_more_tokens_than_are_counted_on_before_it_is_tokenized(tokenizers, texts):
    tokens = tokenizers.tokenize(texts, None)
    longest = max(tokens.t5_input_ids.shape[1], tokens.clap_input_ids.shape[1])
    assert longest <= tokenizers.most_tokens(texts) <= 512


def test_a_short_text_is_not_counted_as_a_long_one(tokenizers):
    assert tokenizers.most_tokens(["a dog barking in the rain"]) < 30
    assert tokenizers.most_tokens(["a dog", "a dog " * 1000]) == 512
