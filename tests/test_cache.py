"""Triton's response cache: texts are encoded once, answers to equal seeds are kept, and no answer is ever another's."""

import re
import urllib.request
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tritonclient.grpc
from audioldm2_client import AudioLDM2Client, InvalidRequestError

from server import EmbeddedServer

pytestmark = pytest.mark.server

TEXT = {"audio_length_in_s": 0.64, "num_inference_steps": 2, "seed": 7}
VARIATIONS = {
    "prompt": {"prompt": "a dog"},
    "one character": {"prompt": "a dot"},
    "negative prompt": {"prompt": "a dog", "negative_prompt": "low quality"},
    "texts exchanged": {"prompt": "low quality", "negative_prompt": "a dog"},
    "no guidance": {"prompt": "a dog", "guidance_scale": 1.0},
    "guidance at the first step": {"prompt": "a dog", "guidance_end": 0.5},
    "guidance at the last step": {"prompt": "a dog", "guidance_start": 0.5},
    "two prompts": {"prompt": ["a dog", "low quality"]},
    "two prompts exchanged": {"prompt": ["low quality", "a dog"]},
    "longer": {"prompt": "a dog", "audio_length_in_s": 1.28},
    "seed": {"prompt": "a dog", "seed": 8},
    "candidates": {"prompt": "a dog", "num_waveforms_per_prompt": 2},
    "scheduler": {"prompt": "a dog", "scheduler": "ddim"},
}


@pytest.fixture(scope="module")
def cached(exported_repository) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(exported_repository, extra_arguments=("--cache-config=local,size=16777216",)) as server:
        yield server


@pytest.fixture(scope="module")
def hits(cached) -> Callable[[str], int]:
    """Return how many of a model's answers have come from the cache, as the metrics show it."""

    def count(model: str) -> int:
        metrics = urllib.request.urlopen(f"http://{cached.metrics_url}/metrics").read().decode()
        found = re.search(rf'^nv_cache_num_hits_per_model{{model="{model}",version="1"}} (\d+)', metrics, re.MULTILINE)
        return int(found.group(1)) if found else 0

    return count


def test_equal_texts_are_encoded_once(cached, hits):
    texts = {"prompt": "a train far away", "negative_prompt": "low quality"}
    with AudioLDM2Client(cached.grpc_url) as client:
        client.generate(**texts, **TEXT)
        before = hits("text_encoder"), hits("gpt2")
        client.generate(**texts, **TEXT | {"seed": 1, "audio_length_in_s": 1.28})
        assert (hits("text_encoder"), hits("gpt2")) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("model_name", ["audioldm2", "audioldm2_cached"])
def test_answers_with_a_cache_are_those_without(cached, triton, model_name):
    with AudioLDM2Client(triton.grpc_url) as client:
        expected = {name: client.generate(**TEXT | given) for name, given in VARIATIONS.items()}
    with AudioLDM2Client(cached.grpc_url, model_name=model_name) as client:
        for when in ("computed", "from the cache"):
            for name, given in VARIATIONS.items():
                result = client.generate(**TEXT | given)
                np.testing.assert_allclose(result.audio, expected[name].audio, atol=1e-5, err_msg=f"{name}, {when}")
                np.testing.assert_allclose(result.clap_scores, expected[name].clap_scores, atol=1e-5)
                assert result.seed == expected[name].seed


def test_an_answer_to_an_equal_request_comes_from_the_cache(cached, hits):
    with AudioLDM2Client(cached.grpc_url, model_name="audioldm2_cached") as client:
        first = client.generate("a bell", **TEXT)
        before = hits("audioldm2_cached")
        again = client.generate("a bell", **TEXT)
        assert hits("audioldm2_cached") == before + 1
    np.testing.assert_array_equal(again.audio, first.audio)


def test_without_a_seed_every_answer_is_another(cached):
    unseeded = {name: value for name, value in TEXT.items() if name != "seed"}
    with AudioLDM2Client(cached.grpc_url) as client:
        assert not np.array_equal(
            client.generate("a dog", **unseeded).audio, client.generate("a dog", **unseeded).audio
        )


def test_the_cached_model_draws_a_seed_once(cached, hits):
    unseeded = {name: value for name, value in TEXT.items() if name != "seed"}
    with AudioLDM2Client(cached.grpc_url, model_name="audioldm2_cached") as client:
        first, before = client.generate("a drum", **unseeded), hits("audioldm2_cached")
        again = client.generate("a drum", **unseeded)
        assert hits("audioldm2_cached") == before + 1
        with_its_seed = client.generate("a drum", **unseeded, seed=first.seed)
    assert again.seed == first.seed
    np.testing.assert_array_equal(again.audio, first.audio)
    np.testing.assert_allclose(with_its_seed.audio, first.audio, atol=1e-5)


def test_a_failure_is_not_kept(cached, hits):
    with AudioLDM2Client(cached.grpc_url, model_name="audioldm2_cached") as client:
        for _ in range(2):
            before = hits("audioldm2_cached")
            with pytest.raises(InvalidRequestError, match="num_inference_steps is out of bounds"):
                client.generate("a dog", **TEXT | {"num_inference_steps": 0})
            assert hits("audioldm2_cached") == before


def test_a_cache_that_is_too_small_changes_nothing(exported_repository, triton):
    with AudioLDM2Client(triton.grpc_url) as client:
        expected = client.generate("a dog", **TEXT)
    with (
        EmbeddedServer(exported_repository, extra_arguments=("--cache-config=local,size=65536",)) as server,
        AudioLDM2Client(server.grpc_url, model_name="audioldm2_cached") as client,
    ):
        for prompt in ("a dog", "a cat", "a cow", "a dog"):
            result = client.generate(prompt, **TEXT)
    np.testing.assert_allclose(result.audio, expected.audio, atol=1e-5)


def test_without_a_cache_both_models_work(triton):
    with tritonclient.grpc.InferenceServerClient(triton.grpc_url) as client:
        assert client.is_model_ready("audioldm2_cached")
    with AudioLDM2Client(triton.grpc_url, model_name="audioldm2_cached") as client:
        assert client.generate("a dog", **TEXT).audio.shape == (1, 10240)
