"""What the committed configuration chooses on a CPU and on simulated GPUs, and half precision that overflows."""

import dataclasses

import device_defaults
import pytest
import torch
from device_choice import device_of
from device_defaults import GRAPH_ROWS, choose
from prepared_unet import PreparedUNet
from unet_forward import UNetForward
from unet_precision import load_in_the_first_that_holds
from unet_shapes import FixedShape, Preparation

from tests.helpers.simulated_cuda import simulated_cuda
from tests.helpers.tiny_unet import CPU, make_options, make_unet, save_unet

GPU = torch.device("cuda", 0)


@pytest.fixture
def can_compile(monkeypatch):
    monkeypatch.setattr(device_defaults, "can_compile", lambda: True)


def test_on_a_cpu_nothing_is_prepared_and_the_type_is_the_exported_one():
    chosen = choose(make_options(), CPU, 256)
    assert (chosen.dtypes, chosen.compile_backend, chosen.uses_graphs, chosen.shapes) == ((None,), "", False, ())


@pytest.mark.usefixtures("can_compile")
def test_on_a_gpu_it_is_half_precision_graphs_and_inductor_at_the_checkpoints_own_length():
    chosen = choose(make_options(), GPU, 256)
    assert chosen.dtypes == (torch.float16, torch.bfloat16)
    assert (chosen.compile_backend, chosen.uses_graphs) == ("inductor", True)
    assert chosen.shapes == tuple(FixedShape(rows, 256, 64) for rows in GRAPH_ROWS)
    assert chosen.describe(torch.float16) == {
        "dtype": "float16",
        "compile_backend": "inductor",
        "cuda_graphs": "on",
        "fixed_shapes": ",".join(f"{rows}x256x64" for rows in GRAPH_ROWS),
    }


def test_no_graph_is_larger_than_a_forward_may_be():
    rows = [shape.rows for shape in choose(make_options(max_rows=8), GPU, 256).shapes]
    assert rows == [1, 2, 4, 6, 8]
    rows = [shape.rows for shape in choose(make_options(frames_per_forward=1024), GPU, 256).shapes]
    assert rows == [1, 2, 4]
    assert [shape.rows for shape in choose(make_options(), GPU, 10**6).shapes] == [1]


def test_without_a_compiler_a_gpu_runs_what_is_captured(monkeypatch):
    monkeypatch.setattr(device_defaults.shutil, "which", lambda _: None)
    chosen = choose(make_options(), GPU, 256)
    assert (chosen.compile_backend, chosen.uses_graphs) == ("", True)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_what_is_given_is_not_chosen(device):
    shapes = (FixedShape(2, 16, 16),)
    given = Preparation("aot_eager", "off", shapes)
    chosen = choose(make_options(dtype="bf16", preparation=given), device, 256)
    assert (chosen.dtypes, chosen.compile_backend) == ((torch.bfloat16,), "aot_eager")
    assert (chosen.uses_graphs, chosen.shapes) == (False, shapes)
    as_exported = choose(make_options(dtype="as_exported"), device, 256)
    assert as_exported.dtypes == (None,)


def test_a_gpu_that_pytorch_cannot_use_is_refused_and_not_replaced(monkeypatch):
    assert device_of("CPU", 0) == CPU
    with pytest.raises(RuntimeError, match=r"Triton has a GPU for it, and PyTorch .* can't use one: .* KIND_CPU"):
        device_of("GPU", 0)
    with simulated_cuda(monkeypatch, num_devices=2):
        assert device_of("GPU", 1) == torch.device("cuda", 1)
        with pytest.raises(RuntimeError, match="asks for GPU 2, and PyTorch sees 2: 0 to 1"):
            device_of("GPU", 2)


class Loader:
    """Loads a tiny UNet in a type, and keeps which were asked for."""

    def __init__(self, *, scale: float = 1.0) -> None:
        self.scale, self.dtypes, self.reports = scale, [], []

    def __call__(self, dtype: torch.dtype | None) -> UNetForward:
        self.dtypes.append(dtype)
        unet = make_unet()
        with torch.no_grad():
            unet.conv_in.weight.mul_(self.scale)
        return UNetForward(unet.to(dtype or torch.float32), CPU, 512)

    def load(self, *dtypes: torch.dtype | None) -> UNetForward:
        return load_in_the_first_that_holds(self, dtypes, self.reports.append)


def test_a_checkpoint_that_bears_half_precision_gets_it():
    loader = Loader()
    assert loader.load(torch.float16, torch.bfloat16).dtype == torch.float16
    assert loader.reports == []


def test_one_that_overflows_in_float16_gets_bfloat16():
    loader = Loader(scale=1e5)
    assert loader.load(torch.float16, torch.bfloat16).dtype == torch.bfloat16
    assert loader.reports == [
        "torch.float16 doesn't hold for this checkpoint: its error against float32 is nan, above 0.05."
    ]


def test_one_that_bears_no_half_precision_stays_in_float32():
    loader = Loader(scale=1e39)
    assert loader.load(torch.float16).dtype == torch.float16, "one type alone is taken as it is"
    assert loader.dtypes == [torch.float16]
    loader = Loader(scale=1e5)
    assert loader.load(torch.float16, torch.float16).dtype == torch.float32
    assert len(loader.reports) == 2


def test_on_a_cpu_the_committed_configuration_prepares_nothing(tmp_path):
    save_unet(tmp_path)
    reports = []
    prepared = PreparedUNet(tmp_path, CPU, make_options(), reports.append)
    unet = prepared.load()
    assert (unet.dtype, prepared.make_graphs(unet)) == (torch.float32, None)
    assert reports == ["dtype float32", "compile_backend none", "cuda_graphs off", "fixed_shapes none"]
    prepared.compile_in_background()
    prepared.close()


@pytest.mark.usefixtures("can_compile")
def test_on_a_gpu_graphs_come_first_and_a_compiled_forward_takes_its_place_later(tmp_path, monkeypatch):
    save_unet(tmp_path)
    options = make_options(max_rows=2)
    compiled = []
    with simulated_cuda(monkeypatch):
        reports = []
        prepared = PreparedUNet(tmp_path, GPU, dataclasses.replace(options, dtype="fp32"), reports.append)
        unet = prepared.load()
        graphs = prepared.make_graphs(unet)
        assert graphs is not None
        key, tokens = (8, 256, 16, 8), 64
        assert graphs.next_wanted() == (key, tokens)
        monkeypatch.setattr(prepared, "_compile_on_gpu", compiled.append)
        monkeypatch.setattr(graphs, "_graphs", {(key, tokens): object()})
        prepared.compile_in_background()
        assert prepared._compiler is not None
        prepared._compiler._thread.join(30)
        assert compiled == [FixedShape(2, 256, 64), FixedShape(1, 256, 64)], "with guidance first"
        assert [graphs.next_outdated() for _ in range(3)] == [((key, tokens), 2), ((key, tokens), 1), None]
        prepared.close()
    assert reports[:4] == [
        "dtype float32",
        "compile_backend inductor",
        "cuda_graphs on",
        "fixed_shapes 1x256x64,2x256x64",
    ]


def test_on_a_gpu_without_graphs_what_is_compiled_is_used(tmp_path, monkeypatch):
    torch.compiler.reset()
    save_unet(tmp_path)
    shape = FixedShape(2, 16, 16)
    options = make_options(dtype="fp32", preparation=Preparation("eager", "off", (shape,)))
    with simulated_cuda(monkeypatch):
        prepared = PreparedUNet(tmp_path, GPU, options, [].append)
        monkeypatch.setattr(UNetForward, "prepare", torch.no_grad()(UNetForward.prepare))
        unet = prepared.load()
        assert prepared.make_graphs(unet) is None
        assert list(unet._fixed) == [shape]
        prepared.compile_in_background()
        assert prepared._compiler is None, "it is done by now"
