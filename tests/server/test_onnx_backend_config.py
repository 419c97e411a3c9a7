"""The onnxruntime backend reads config.pbtxt as the native one does, and refuses what it doesn't understand."""

import pytest
from onnx_backend_config import ConfigError, GraphTensor, check_signature, parse_config

FLOAT = "tensor(float)"


def config(*, batch=0, inputs=(("x", [3]),), outputs=(("y", [3]),), **rest):
    def entries(tensors):
        return [{"name": name, "data_type": "TYPE_FP32", "dims": [str(d) for d in dims]} for name, dims in tensors]

    return {"max_batch_size": batch, "input": entries(inputs), "output": entries(outputs), **rest}


def parameter(name, value):
    return parse_config(config(parameters={name: {"string_value": value}}))


def check(wanted, x=(3,), y=(3,), *, types=(FLOAT, FLOAT), extra_inputs=(), overridable=()):
    inputs = [GraphTensor("x", types[0], x), *extra_inputs]
    check_signature(parse_config(wanted), inputs, [GraphTensor("y", types[1], y)], overridable)


def test_without_options_everything_is_left_to_onnx_runtime():
    parsed = parse_config(config())
    assert (parsed.model_filename, parsed.graph_level, parsed.execution_mode) == (
        "model.onnx",
        "ORT_ENABLE_ALL",
        "ORT_SEQUENTIAL",
    )
    assert (parsed.intra_op_thread_count, parsed.inter_op_thread_count) == (0, 0)
    assert (parsed.enable_mem_arena, parsed.enable_mem_pattern) == (None, None)
    assert {**parsed.session_entries, **parsed.run_entries, **parsed.cuda_options} == {}


def test_each_parameter_reaches_its_place():
    assert parameter("intra_op_thread_count", "2").intra_op_thread_count == 2
    assert parameter("inter_op_thread_count", "3").inter_op_thread_count == 3
    assert parameter("execution_mode", "1").execution_mode == "ORT_PARALLEL"
    assert parameter("enable_mem_arena", "0").enable_mem_arena is False
    assert parameter("enable_mem_pattern", "True").enable_mem_pattern is True
    shrinkage = "memory.enable_memory_arena_shrinkage"
    assert parameter(shrinkage, "cpu:0").run_entries == {shrinkage: "cpu:0"}
    allocator = "session.use_device_allocator_for_initializers"
    assert parameter(allocator, "1").session_entries == {allocator: "1"}
    assert parameter("cudnn_conv_algo_search", "1").cuda_options == {"cudnn_conv_algo_search": "HEURISTIC"}
    assert parameter("arena_extend_strategy", "1").cuda_options == {"arena_extend_strategy": "kSameAsRequested"}
    assert parameter("gpu_mem_limit", "1073741824").cuda_options == {"gpu_mem_limit": "1073741824"}


def test_parameters_of_the_cuda_accelerator_are_cuda_options():
    accelerator = {"name": "cuda", "parameters": {"use_tf32": "0"}}
    optimization = {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}
    assert parse_config(config(optimization=optimization)).cuda_options == {"use_tf32": "0"}


@pytest.mark.parametrize(
    ("level", "name"),
    [(-1, "ORT_ENABLE_BASIC"), (0, "ORT_ENABLE_ALL"), (1, "ORT_ENABLE_EXTENDED"), (2, "ORT_DISABLE_ALL")],
)
def test_graph_levels_mean_what_they_mean_natively(level, name):
    assert parse_config(config(optimization={"graph": {"level": level}})).graph_level == name


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("threads", "2", "unknown parameter 'threads'; the onnxruntime backend knows intra_op_thread_count, "),
        ("intra_op_thread_count", "-1", "'intra_op_thread_count' must be a whole number of 0 or more, and is '-1'"),
        ("intra_op_thread_count", "two", "and is 'two'"),
        ("execution_mode", "2", "'execution_mode' must be one of 0, 1, and is '2'"),
        ("enable_mem_arena", "yes", "'enable_mem_arena' must be one of 1, true, on, 0, false, off, and is 'yes'"),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_name_and_value(name, value, complaint):
    with pytest.raises(ConfigError) as caught:
        parameter(name, value)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"optimization": {"graph": {"level": 3}}}, "level must be one of -1, 0, 1, 2, and is 3"),
        (
            {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [{"name": "tensorrt"}]}}},
            "must be 'cuda'",
        ),
        (
            {"optimization": {"execution_accelerators": {"cpu_execution_accelerator": [{"name": "openvino"}]}}},
            "cpu_execution_accelerator",
        ),
        ({"sequence_batching": {"state": [{}]}}, "sequence_batching"),
        ({"batch_input": [{}]}, "batch_input"),
        ({"model_operations": {"op_library_filename": ["x.so"]}}, "model_operations"),
    ],
)
def test_what_only_the_native_backend_can_do_is_refused_by_name(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_config(config(**options))


def test_a_type_that_numpy_lacks_is_refused_with_the_tensor():
    wanted = config()
    wanted["input"][0]["data_type"] = "TYPE_BF16"
    with pytest.raises(ConfigError, match="input 'x' is TYPE_BF16"):
        parse_config(wanted)


def test_equal_signatures_agree():
    check(config())
    check(config(batch=4), x=(-1, 3), y=(-1, 3))
    check(config(inputs=[("x", [-1, 8])], outputs=[("y", [-1])]), x=(-1, 8), y=(-1,))


def test_an_input_may_be_fixed_by_the_configuration_alone():
    check(config(inputs=[("x", [3])]), x=(-1,))


def test_a_scalar_of_the_graph_is_a_one_in_the_configuration():
    check(config(inputs=[("x", [1])], outputs=[("y", [1])]), x=(), y=())
    with pytest.raises(ConfigError, match="output 'y'"):
        check(config(inputs=[("x", [1])], outputs=[("y", [2])]), x=(), y=())


@pytest.mark.parametrize(
    ("wanted", "graph", "complaint"),
    [
        (config(), {"x": (4,)}, "input 'x' has dims [3] in config.pbtxt, and [4] in the graph"),
        (config(), {"x": (3, 3)}, "and [3, 3] in the graph"),
        (config(), {"y": (4,)}, "output 'y' has dims [3]"),
        (config(inputs=[("x", [-1])]), {"x": (3,)}, "a size that is -1 in config.pbtxt must be symbolic"),
        (config(outputs=[("y", [-1])]), {"y": (3,)}, "output 'y' has dims [-1]"),
        (config(), {"y": (-1,)}, "output 'y' has dims [3]"),
        (config(batch=2), {"x": (2, 3), "y": (-1, 3)}, "(the first one is the batch, as max_batch_size > 0)"),
        (config(), {"types": ("tensor(int64)", FLOAT)}, "input 'x' is TYPE_FP32 in config.pbtxt, and tensor(int64)"),
        (config(), {"types": (FLOAT, "tensor(float16)")}, "output 'y' is TYPE_FP32"),
        (config(inputs=[("x", [3]), ("mask", [3])]), {}, "input 'mask', and the graph has only x"),
        (config(outputs=[("z", [3])]), {}, "output 'z', and the graph has only y"),
        (config(), {"extra_inputs": [GraphTensor("mask", FLOAT, (3,))]}, "needs an input 'mask'"),
    ],
)
def test_a_signature_that_differs_is_refused_with_the_tensors_name(wanted, graph, complaint):
    with pytest.raises(ConfigError) as caught:
        check(wanted, **graph)
    assert complaint in str(caught.value)


def test_an_optional_input_must_have_a_default_in_the_graph():
    wanted = config(inputs=[("x", [3]), ("mask", [3])])
    wanted["input"][1]["optional"] = True
    mask = GraphTensor("mask", FLOAT, (3,))
    check(wanted, overridable=[mask])
    with pytest.raises(ConfigError, match="input 'mask' is optional, and the graph always needs it"):
        check(wanted, extra_inputs=[mask])


def test_the_graph_may_have_more_outputs_than_the_configuration():
    check(config(outputs=[]))
