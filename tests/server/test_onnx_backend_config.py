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


def accelerator(name="cuda", device="gpu", **parameters):
    entry = {"name": name, "parameters": parameters}
    return {"optimization": {"execution_accelerators": {f"{device}_execution_accelerator": [entry]}}}


def check(wanted, x=(3,), y=(3,), *, types=(FLOAT, FLOAT), extra_inputs=(), overridable=()):
    inputs = [GraphTensor("x", types[0], x), *extra_inputs]
    check_signature(parse_config(wanted), inputs, [GraphTensor("y", types[1], y)], overridable)


def test_without_options_everything_but_spinning_is_left_to_onnx_runtime():
    parsed = parse_config(config())
    assert parsed.model_filename == "model.onnx"
    assert (parsed.intra_op_thread_count, parsed.allow_spinning, parsed.arena_shrinkage) == (0, False, "")
    assert parsed.cuda_options == {}


def test_each_parameter_reaches_its_place():
    assert parameter("intra_op_thread_count", " 2").intra_op_thread_count == 2
    assert parameter("session.intra_op.allow_spinning", "1").allow_spinning is True
    assert parameter("session.intra_op.allow_spinning", "0").allow_spinning is False
    assert parameter("memory.enable_memory_arena_shrinkage", "cpu:0").arena_shrinkage == "cpu:0"


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("cudnn_conv_algo_search", "0", "EXHAUSTIVE"),
        ("cudnn_conv_algo_search", "1", "HEURISTIC"),
        ("cudnn_conv_algo_search", "2", "DEFAULT"),
        ("arena_extend_strategy", "0", "kNextPowerOfTwo"),
        ("arena_extend_strategy", "1", "kSameAsRequested"),
        ("gpu_mem_limit", " 4294967296", "4294967296"),
    ],
)
def test_the_native_backends_parameters_of_a_gpu_become_onnx_runtimes(name, value, option):
    assert parameter(name, value).cuda_options == {name: option}


def test_the_other_options_of_a_gpu_come_from_the_accelerator_cuda():
    parsed = parse_config(config(**accelerator(use_tf32="0", prefer_nhwc="1")))
    assert parsed.cuda_options == {"use_tf32": "0", "prefer_nhwc": "1"}


def test_what_triton_writes_into_every_configuration_is_accepted():
    optimization = {"priority": "PRIORITY_DEFAULT", "graph": {"level": 0}, "input_pinned_memory": {"enable": True}}
    assert parse_config(config(optimization=optimization, model_operations={"op_library_filename": []}))


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("threads", "2", "unknown parameter 'threads'; the embedded onnxruntime backend knows intra_op_thread_count, "),
        ("enable_mem_arena", "0", "unknown parameter 'enable_mem_arena'"),
        ("intra_op_thread_count", "-1", "'intra_op_thread_count' must be a whole number of 0 or more, and is '-1'"),
        ("intra_op_thread_count", "two", "and is 'two'"),
        ("session.intra_op.allow_spinning", "on", "'session.intra_op.allow_spinning' must be 0 or 1, and is 'on'"),
        ("cudnn_conv_algo_search", "HEURISTIC", "must be one of 0 (EXHAUSTIVE), 1 (HEURISTIC), 2 (DEFAULT), and is 'H"),
        ("arena_extend_strategy", "2", "must be one of 0 (kNextPowerOfTwo), 1 (kSameAsRequested), and is '2'"),
        ("gpu_mem_limit", "0", "'gpu_mem_limit' must be a number of bytes above 0, and is '0'"),
        ("gpu_mem_limit", "8 GiB", "and is '8 GiB'"),
        ("use_tf32", "0", "unknown parameter 'use_tf32'"),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_name_and_value(name, value, complaint):
    with pytest.raises(ConfigError) as caught:
        parameter(name, value)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"optimization": {"graph": {"level": 2}}}, "sets optimization.graph.level"),
        ({"optimization": {"graph": {"level": -1}}}, "sets optimization.graph.level"),
        (accelerator("tensorrt"), "gpu_execution_accelerator to 'tensorrt', and .* supports only 'cuda'"),
        (accelerator("openvino", "cpu"), "execution_accelerators.cpu_execution_accelerator"),
        (accelerator(gpu_mem_limit="1"), "'cuda', 'gpu_mem_limit'; .* knows use_tf32, prefer_nhwc"),
        (accelerator(use_tf32="no"), "'use_tf32' must be 0 or 1, and is 'no'"),
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
