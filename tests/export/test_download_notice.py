"""What is said before a download."""

import pytest
from huggingface_hub.hf_api import ModelInfo

from export.checkpoint_files import weights_patterns
from export.download_notice import announce_download, notice

FILES = {
    "unet/diffusion_pytorch_model.safetensors": 1_400_000_000,
    "unet/diffusion_pytorch_model.bin": 1_400_000_000,
    "vae/diffusion_pytorch_model-00001-of-00002.safetensors": 60_000_000,
    "vae/diffusion_pytorch_model-00002-of-00002.safetensors": 50_000_000,
    "text_encoder/pytorch_model.bin": 800_000_000,
    "README.md": 5_000,
}
PATTERNS = [
    [pattern for form in weights_patterns(component, library) for pattern in form]
    for component, library in {"unet": "diffusers", "vae": "diffusers", "text_encoder": "transformers"}.items()
]


def repository(licence: str | None) -> ModelInfo:
    siblings = [{"rfilename": name, "size": size} for name, size in FILES.items()]
    return ModelInfo(id="some/one", siblings=siblings, cardData={"license": licence} if licence else None)


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0, for non-commercial use only."),
        ("apache-2.0", "apache-2.0."),
        (None, "not stated."),
    ],
)
def test_size_and_licence_are_said_of_the_one_form_that_is_downloaded(licence, said):
    sentence = notice("some/one", repository(licence), PATTERNS)
    assert sentence.startswith("some/one: 2.3 GB to download")
    assert sentence.endswith(f"Licence of the weights: {said}")


def test_nothing_is_said_where_the_hub_does_not_tell():
    said: list[str] = []
    announce_download("some/one", PATTERNS, said.append)  # the tests are offline
    assert said == []
