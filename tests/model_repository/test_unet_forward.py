"""One forward of the UNet: the weights' type, and shapes that are prepared beforehand."""

import os
import shutil
import stat

import fixed_shape_forward
import pytest
import torch
import unet_forward
from denoising_batch import DenoisingBatch
from text_conditioning import Conditioning
from torch._dynamo.utils import counters
from unet_forward import UNetForward
from unet_shapes import FixedShape, Preparation

from tests.helpers.tiny_unet import CPU, SHALLOW, make_forward, make_unet, relative_rms, save_unet

TOLERANCE = 1e-5


def make_inputs(unet: UNetForward, rows: int = 3, tokens: int = 7, frames: int = 16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[0, tokens // 2 :] = 0
    conditioning = unet.project(
        torch.randn(rows, 8, unet.sizes.generated_width, generator=generator),
        torch.randn(rows, tokens, unet.sizes.prompt_width, generator=generator),
        mask,
    )
    return torch.randn(rows, 8, frames, 16, generator=generator), torch.linspace(999, 1, rows), conditioning


@pytest.mark.parametrize(
    ("saved", "wanted", "loaded"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_weights_keep_the_type_that_they_were_saved_in_unless_another_is_wanted(saved, wanted, loaded, tmp_path):
    save_unet(tmp_path).to(saved).save_pretrained(tmp_path)
    unet = UNetForward.load(tmp_path, CPU, 512, wanted)
    assert unet.dtype == loaded
    inputs = make_inputs(unet)
    assert inputs[2].prompt.dtype == loaded
    assert unet(*inputs).dtype == torch.float32


def test_what_is_loaded_is_what_was_saved(tmp_path):
    save_unet(tmp_path, seed=3)
    loaded, saved = UNetForward.load(tmp_path, CPU, 77, None), make_forward(seed=3)
    assert (loaded.sizes.generated_width, loaded.sizes.prompt_width, loaded.sizes.max_tokens) == (12, 20, 77)
    assert torch.equal(loaded(*make_inputs(loaded)), saved(*make_inputs(saved)))
    other = make_forward(seed=4)
    assert relative_rms(other(*make_inputs(other)), saved(*make_inputs(saved))) > 0.1


def test_bfloat16_is_close_to_float32():
    exact = make_forward(seed=1)
    rounded = UNetForward(make_unet(seed=1).to(torch.bfloat16), CPU, 512)
    error = relative_rms(rounded(*make_inputs(rounded)), exact(*make_inputs(exact)))
    # Not below either: it would be float32 that computes.
    assert 1e-3 < error < 5e-2


@pytest.fixture(scope="module", params=["", "aot_eager"])
def prepared(request) -> tuple[UNetForward, UNetForward]:
    """A UNet with a fixed shape of 4 rows, 16 frames and 16 tokens, and one without."""
    torch.compiler.reset()  # Dynamo stops to compile a function that other tests had it compile eight times
    counters.clear()
    unet, eager = (UNetForward(make_unet(seed=1, **SHALLOW), CPU, 512) for _ in range(2))
    list(unet.prepare(Preparation(request.param, fixed_shapes=(FixedShape(4, 16, 16),))))
    assert counters["stats"]["unique_graphs"] == (1 if request.param else 0)
    return unet, eager


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "tokens"), [(4, 16), (4, 7), (2, 16), (1, 1)])
def test_a_fixed_shape_gives_the_same_for_fewer_rows_and_tokens(prepared, rows, tokens):
    unet, eager = prepared
    compiled = counters["stats"]["unique_graphs"]
    inputs = make_inputs(eager, rows, tokens)
    output = unet(*inputs)
    assert output.shape == (rows, 8, 16, 16)
    assert relative_rms(output, eager(*inputs)) <= TOLERANCE
    assert counters["stats"]["unique_graphs"] == compiled


def test_every_call_of_a_fixed_shape_has_the_text_and_the_rows_of_its_own(prepared):
    unet, eager = prepared
    long, short, many = (make_inputs(eager, rows, tokens, seed=rows) for rows, tokens in ((2, 16), (3, 5), (4, 9)))
    # The same latents with other text, and the same text with other latents.
    other_text, other_latents = (*long[:2], make_inputs(eager, 2, 3)[2]), (-long[0], *long[1:])
    calls = [long, short, long, many, short, long, other_text, other_latents, long]
    outputs = [unet(*inputs) for inputs in calls]
    for output, inputs in zip(outputs, calls, strict=True):
        assert relative_rms(output, eager(*inputs)) <= TOLERANCE
    assert relative_rms(outputs[6], outputs[5]) > 100 * TOLERANCE


class RecordedForward:
    """Stands for what is prepared: it knows its shape, and writes down what it was asked."""

    made: list["RecordedForward"]

    def __init__(self, function, latents, timesteps, conditioning):
        self.shape = FixedShape(len(latents), latents.shape[2], conditioning.tokens)
        self.calls = 0
        assert len(timesteps) == len(function(latents, timesteps, conditioning)) == self.shape.rows
        RecordedForward.made.append(self)

    def __call__(self, latents: torch.Tensor, _timesteps: torch.Tensor, _conditioning: Conditioning) -> torch.Tensor:
        self.calls += 1
        return torch.zeros_like(latents)


@pytest.fixture
def recorded_forwards(monkeypatch) -> list[RecordedForward]:
    monkeypatch.setattr(RecordedForward, "made", [], raising=False)
    monkeypatch.setattr(unet_forward, "FixedShapeForward", RecordedForward)
    return RecordedForward.made


SHAPES = (FixedShape(4, 16, 16), FixedShape(2, 16, 32), FixedShape(2, 16, 16), FixedShape(1, 24, 64))


@pytest.mark.parametrize(
    ("rows", "frames", "tokens", "chosen"),
    [
        (1, 16, 7, "2x16x16"),
        (2, 16, 16, "2x16x16"),
        (2, 16, 17, "2x16x32"),
        (3, 16, 16, "4x16x16"),
        (1, 24, 64, "1x24x64"),
        (5, 16, 7, None),
        (3, 16, 17, None),
        (1, 16, 33, None),
        (1, 8, 7, None),
    ],
)
def test_the_smallest_shape_with_room_is_chosen_and_what_fits_none_runs_eagerly(
    rows, frames, tokens, chosen, recorded_forwards
):
    unet, eager = make_forward(), make_forward()
    list(unet.prepare(Preparation(fixed_shapes=SHAPES)))
    inputs = make_inputs(eager, rows, tokens, frames)
    output = unet(*inputs)
    assert [str(forward.shape) for forward in recorded_forwards if forward.calls] == ([chosen] if chosen else [])
    if chosen is None:
        assert relative_rms(output, eager(*inputs)) <= TOLERANCE


@pytest.mark.parametrize(("vectors", "bins"), [(5, 16), (8, 8), (8, 1)])
def test_other_vectors_or_bins_than_a_fixed_shape_has_run_eagerly(vectors, bins, recorded_forwards):
    unet, eager = make_forward(), make_forward()
    list(unet.prepare(Preparation(fixed_shapes=SHAPES)))
    latents, timesteps, conditioning = make_inputs(eager, 2, 7)
    other = Conditioning(conditioning.generated[:, :vectors], conditioning.prompt, conditioning.attention_mask)
    output = unet(latents[..., :bins], timesteps, other)
    assert not any(forward.calls for forward in recorded_forwards)
    assert relative_rms(output, eager(latents[..., :bins], timesteps, other)) <= TOLERANCE


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=2)  # it is 8, and each takes seconds
def test_more_shapes_than_dynamo_compiles_by_default_are_all_compiled():
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    shapes = tuple(FixedShape(1, 8 * index, 16) for index in range(1, 5))
    unet = UNetForward(make_unet(**SHALLOW), CPU, 512)
    list(unet.prepare(Preparation(backend, fixed_shapes=shapes)))
    assert len(compiled) == len(shapes)


def test_every_shape_is_reported_with_the_seconds_that_it_took(recorded_forwards, monkeypatch):
    clock = iter([10.0, 12.5, 20.0, 21.0])
    unet = make_forward()
    monkeypatch.setattr(unet_forward.time, "perf_counter", clock.__next__)
    assert list(unet.prepare(Preparation(fixed_shapes=SHAPES[:2]))) == [(SHAPES[0], 2.5), (SHAPES[1], 1.0)]
    assert tuple(forward.shape for forward in recorded_forwards) == SHAPES[:2]


@pytest.fixture
def cache_variable(monkeypatch) -> str:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/as/before")  # so that it is put back
    return "TORCHINDUCTOR_CACHE_DIR"


def prepare_cache(folder) -> None:
    list(make_forward().prepare(Preparation("aot_eager", cache_folder=folder)))


def test_the_compile_cache_is_a_private_folder(cache_variable, tmp_path):
    folder = tmp_path / "cache" / "inductor"
    for _start in range(2):
        prepare_cache(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert os.environ[cache_variable] == str(folder)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_compile_cache_that_others_can_write_to_is_refused(mode, cache_variable, tmp_path):
    tmp_path.chmod(mode)
    with pytest.raises(PermissionError, match=f"{tmp_path} holds compiled code, and others can write there"):
        prepare_cache(tmp_path)
    assert os.environ[cache_variable] == "/as/before"


def test_a_compile_cache_that_belongs_to_somebody_else_is_refused(cache_variable, tmp_path, monkeypatch):
    monkeypatch.setattr(fixed_shape_forward.os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="make it yours"):
        prepare_cache(tmp_path)
    assert os.environ[cache_variable] == "/as/before"


def test_without_a_compile_cache_the_environment_stays_as_it_is(cache_variable):
    prepare_cache(None)
    assert os.environ[cache_variable] == "/as/before"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles with g++ on a CPU, and there is none")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch's own
@pytest.mark.usefixtures("cache_variable")
def test_inductor_takes_what_it_has_compiled_from_the_cache_and_another_shape_leaves_the_first(tmp_path):
    """As a server does that is started again."""
    first, second = FixedShape(2, 16, 8), FixedShape(1, 16, 8)
    eager = UNetForward(make_unet(seed=1, **SHALLOW), CPU, 512)
    taken = []
    for _start in range(2):
        torch.compiler.reset()
        counters.clear()
        unet = UNetForward(make_unet(seed=1, **SHALLOW), CPU, 512)
        list(unet.prepare(Preparation("inductor", fixed_shapes=(first,), cache_folder=tmp_path / "cache")))
        inputs = make_inputs(eager, first.rows, first.tokens)
        assert relative_rms(unet(*inputs), eager(*inputs)) <= TOLERANCE
        taken.append((counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]))
    assert taken == [(1, 0), (0, 1)]
    list(unet.prepare(Preparation("inductor", fixed_shapes=(second,), cache_folder=tmp_path / "cache")))
    assert counters["inductor"]["fxgraph_cache_miss"] == 1
    assert counters["stats"]["unique_graphs"] == 2
    for rows in (2, 1, 2):
        inputs = make_inputs(eager, rows, 8, seed=rows)
        assert relative_rms(unet(*inputs), eager(*inputs)) <= TOLERANCE
    assert counters["stats"]["unique_graphs"] == 2


def test_what_the_loop_gives_recompiles_nothing_whatever_text_has_come_in_between():
    torch.compiler.reset()
    counters.clear()
    unet = UNetForward(make_unet(**SHALLOW), CPU, 512)
    shapes = tuple(FixedShape(rows, 16, 16) for rows in (2, 4))
    list(unet.prepare(Preparation("aot_eager", cuda_graphs="on", fixed_shapes=shapes)))
    assert counters["stats"]["unique_graphs"] == len(shapes)
    batch = DenoisingBatch((8, 16, 16), CPU, (16, 32))
    with torch.inference_mode():
        for tokens in (16, 32, 16):
            batch.reserve(unet.blank_text(), rows=8, tokens=tokens)
            if tokens == 16:
                for shape in shapes:
                    batch.forward_and_advance(unet.forward_at(shape), shape.rows, shape.tokens)
    assert counters["stats"]["unique_graphs"] == len(shapes)
