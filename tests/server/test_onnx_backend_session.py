"""The onnxruntime backend's session: batches are joined and split, failures stay apart, options reach ONNX Runtime."""

import numpy as np
import onnx
import onnx_backend_session
import onnxruntime
import pytest
from onnx_backend_config import BackendConfig, ConfigError, TensorConfig, parse_config
from onnx_backend_session import OnnxSession, Request, execution_providers, is_invalid_argument, run_in_batches

from tests.helpers import tiny_repository as tiny

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


def test_memory_arena_shrinkage_is_accepted_by_a_run(path):
    config = BackendConfig("model.onnx", 8, DOUBLE.inputs, DOUBLE.outputs, arena_shrinkage="cpu:0")
    [result] = OnnxSession(path, config).run([rows(1)])
    assert result["y"].tolist() == [[2] * 3]


def test_a_gpu_instance_asks_for_cuda_on_its_own_device_first(monkeypatch):
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    assert execution_providers(None) == ["CPUExecutionProvider"]
    assert execution_providers(1) == [("CUDAExecutionProvider", {"device_id": "1"}), "CPUExecutionProvider"]
