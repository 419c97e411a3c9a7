"""The onnxruntime backend's session: batches are joined and split, failures stay apart, options reach ONNX Runtime."""

import numpy as np
import onnx
import onnx_backend_session
import onnxruntime
import pytest
from google.protobuf.json_format import MessageToDict
from onnx_backend_config import BackendConfig, ConfigError, TensorConfig, parse_config
from onnx_backend_session import (
    OnnxSession,
    Request,
    execution_providers,
    is_device_lost,
    is_invalid_argument,
    run_in_batches,
    run_options,
)

from tests.helpers import tiny_repository as tiny
from tests.helpers.triton_configs import read_configs

DOUBLE = BackendConfig(
    "model.onnx", 8, (TensorConfig("x", "TYPE_FP32", (3,)),), (TensorConfig("y", "TYPE_FP32", (3,)),)
)


class Recorder:
    """Doubles x, fails where it is negative, and remembers the shapes that it was called with."""

    def __init__(self):
        self.shapes = []

    def __call__(self, inputs, outputs):
        self.shapes.append(inputs["x"].shape)
        if (inputs["x"] < 0).any():
            raise ValueError("negative")
        return {name: {"y": 2 * inputs["x"], "z": inputs["x"] + 1}[name] for name in outputs}


def rows(count, width=3, value=1.0, outputs=("y",)):
    return Request({"x": np.full((count, width), value, dtype=np.float32)}, outputs)


def test_requests_are_joined_along_the_batch_and_get_their_own_rows():
    run = Recorder()
    results = run_in_batches([rows(1, value=1), rows(2, value=2), rows(1, value=3)], run, batched=True)
    assert run.shapes == [(4, 3)]
    assert [result["y"].tolist() for result in results] == [[[2] * 3], [[4] * 3] * 2, [[6] * 3]]


def test_requests_of_other_widths_run_apart_and_keep_their_order():
    run = Recorder()
    results = run_in_batches([rows(1, 3), rows(1, 5), rows(1, 3)], run, batched=True)
    assert sorted(run.shapes) == [(1, 5), (2, 3)]
    assert [result["y"].shape for result in results] == [(1, 3), (1, 5), (1, 3)]


def test_requests_with_other_inputs_run_apart():
    run = Recorder()
    other = Request({"x": np.ones((1, 3), np.float32), "w": np.ones((1, 3), np.float32)}, ("y",))
    run_in_batches([rows(1), other], run, batched=True)
    assert run.shapes == [(1, 3), (1, 3)]


def test_a_model_without_a_batch_dimension_runs_requests_one_by_one():
    run = Recorder()
    run_in_batches([rows(1), rows(1)], run, batched=False)
    assert run.shapes == [(1, 3), (1, 3)]


def test_only_the_culprit_of_a_batch_fails():
    results = run_in_batches([rows(1), rows(1, value=-1), rows(2)], Recorder(), batched=True)
    assert isinstance(results[1], ValueError)
    assert results[0]["y"].tolist() == [[2] * 3]
    assert results[2]["y"].tolist() == [[2] * 3] * 2


def test_each_request_gets_the_outputs_that_it_asked_for():
    results = run_in_batches([rows(1, outputs=("y",)), rows(1, outputs=("z", "y"))], Recorder(), batched=True)
    assert [list(result) for result in results] == [["y"], ["z", "y"]]


def test_an_output_without_the_batchs_rows_is_an_error_not_a_wrong_answer():
    def run(inputs, _):
        return {"y": inputs["x"][:1]}

    joined = run_in_batches([rows(2), rows(2)], run, batched=True)
    assert [str(result) for result in joined] == ["output 'y' has shape [1, 3] for a batch of 2"] * 2


@pytest.fixture
def path(tmp_path):
    onnx.save(tiny.double_graph(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_session_computes(path):
    [result] = OnnxSession(path, DOUBLE).run([rows(2)])
    assert result["y"].tolist() == [[2] * 3] * 2


def test_a_folder_of_the_models_name_holds_the_model(tmp_path):
    (tmp_path / "model.onnx").mkdir()
    onnx.save(tiny.double_graph(), tmp_path / "model.onnx" / "model.onnx")
    OnnxSession(tmp_path / "model.onnx", DOUBLE)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"other\.onnx is missing"):
        OnnxSession(tmp_path / "other.onnx", DOUBLE)


def test_onnx_runtime_blames_the_request_for_an_index_out_of_range(tmp_path):
    onnx.save(tiny.lookup_graph(), tmp_path / "model.onnx")
    inputs = (TensorConfig("index", "TYPE_INT64", (1,)),)
    outputs = (TensorConfig("y", "TYPE_FP32", (3,)),)
    session = OnnxSession(tmp_path / "model.onnx", BackendConfig("model.onnx", 4, inputs, outputs))
    [error] = session.run([Request({"index": np.array([[99]])}, ("y",))])
    assert is_invalid_argument(error)
    assert not is_invalid_argument(RuntimeError("anything else"))


def test_strings_and_scalars_are_translated_both_ways(tmp_path):
    onnx.save(tiny.string_graph(), tmp_path / "model.onnx")
    outputs = (TensorConfig("y", "TYPE_STRING", (-1,)), TensorConfig("size", "TYPE_INT64", (1,)))
    config = BackendConfig("model.onnx", 0, (TensorConfig("x", "TYPE_STRING", (-1,)),), outputs)
    words = np.array(["Glück".encode(), b""], dtype=object)
    [result] = OnnxSession(tmp_path / "model.onnx", config).run([Request({"x": words}, ("y", "size"))])
    assert result["y"].tolist() == words.tolist()
    assert result["size"].tolist() == [2]


def test_text_that_is_not_utf8_fails_its_request_only(tmp_path):
    onnx.save(tiny.string_graph(), tmp_path / "model.onnx")
    strings = TensorConfig("x", "TYPE_STRING", (-1,)), TensorConfig("y", "TYPE_STRING", (-1,))
    session = OnnxSession(tmp_path / "model.onnx", BackendConfig("model.onnx", 0, strings[:1], strings[1:]))
    bad, good = (Request({"x": np.array([text], dtype=object)}, ("y",)) for text in (b"\xff", b"fine"))
    results = session.run([bad, good])
    assert isinstance(results[0], UnicodeDecodeError)
    assert is_invalid_argument(results[0])
    assert results[1]["y"].tolist() == [b"fine"]


@pytest.mark.parametrize(
    ("parameters", "threads", "spinning"),
    [({}, 0, "0"), ({"intra_op_thread_count": "2", "session.intra_op.allow_spinning": "1"}, 2, "1")],
)
def test_every_option_reaches_the_session_options(parameters, threads, spinning):
    config = parse_config({"parameters": {name: {"string_value": value} for name, value in parameters.items()}})
    options = onnx_backend_session.session_options(config)
    assert options.intra_op_num_threads == threads
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == spinning


def committed(model):
    return parse_config(MessageToDict(read_configs()[model], preserving_proto_field_name=True))


@pytest.fixture
def cuda(monkeypatch):
    """The names that ONNX Runtime has with CUDA; no session can be made with them here."""
    monkeypatch.setattr(onnx_backend_session, "has_cuda", lambda: True)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)


EXACT = {"device_id": "1", "use_tf32": "0"}
HEURISTIC = {**EXACT, "cudnn_conv_algo_search": "HEURISTIC"}
BOUNDED = {**HEURISTIC, "arena_extend_strategy": "kSameAsRequested", "gpu_mem_limit": str(8 * 2**30)}


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("text_encoder", EXACT),
        ("gpt2", EXACT),
        ("vae", BOUNDED),
        ("vocoder", BOUNDED),
        ("clap_audio", HEURISTIC),
    ],
)
def test_a_gpu_instance_asks_for_cuda_on_its_own_device_as_the_configuration_says(model, options):
    config = committed(model)
    assert execution_providers(config, 1) == [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
    assert execution_providers(config, None) == ["CPUExecutionProvider"]


@pytest.mark.parametrize("model", ["vae", "vocoder"])
def test_a_run_gives_back_the_memory_of_every_gpu_that_it_may_be_on_and_runs_without_one(model, path):
    shrinkage = committed(model).arena_shrinkage
    assert shrinkage.split(";") == ["cpu:0", *(f"gpu:{device}" for device in range(8))]
    config = BackendConfig("model.onnx", 8, DOUBLE.inputs, DOUBLE.outputs, arena_shrinkage=shrinkage)
    options = run_options(config)
    assert options.get_run_config_entry("memory.enable_memory_arena_shrinkage") == shrinkage
    [result] = OnnxSession(path, config).run([rows(1)])
    assert result["y"].tolist() == [[2] * 3]


def test_a_gpu_instance_without_cuda_is_refused_and_not_moved_to_the_cpu(path):
    with pytest.raises(ConfigError) as caught:
        OnnxSession(path, DOUBLE, device_id=1)
    assert "to run on GPU 1, and the installed onnxruntime has no CUDA; install the one that has it (`make A" in str(
        caught.value
    )
    assert "or write KIND_CPU into the instance_group of its config.pbtxt" in str(caught.value)


@pytest.mark.usefixtures("cuda")
def test_a_gpu_instance_whose_cuda_cannot_be_used_is_refused_and_not_moved_to_the_cpu(path):
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(ConfigError) as caught:
        OnnxSession(path, DOUBLE, device_id=1)
    assert "can't use CUDA device 1, see its message in the log" in str(caught.value)
    assert "or write KIND_CPU into the instance_group of its config.pbtxt" in str(caught.value)


def test_no_failure_moves_a_session_to_the_cpu(path, monkeypatch):
    asked = []

    class Spy(onnxruntime.InferenceSession):
        def __init__(self, *arguments, **options):
            asked.append(options["enable_fallback"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Spy)
    OnnxSession(path, DOUBLE)
    assert asked == [0]


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (
            "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=a ; file=b.cc ; line=63 ;",
            True,
        ),
        ("CUDA failure 719: unspecified launch failure ; GPU=0 ; hostname=a ;", True),
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=a ; expr=cudaMalloc((void**)&p, size);", False),
        ("Failed to allocate memory for requested buffer of size 700", False),
    ],
)
def test_only_an_error_that_no_later_call_survives_ends_the_process(text, lost):
    assert is_device_lost(RuntimeError(text)) is lost
