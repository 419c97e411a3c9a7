"""The committed configurations: the public contract, edges that fit, and nothing but what every Triton knows."""

import onnx
import pytest
from onnx.helper import tensor_dtype_to_np_dtype
from tritonclient.utils import triton_to_np_dtype

from tests.helpers.triton_configs import REPOSITORY, read_configs, signature

CONFIGS = read_configs()
ENSEMBLE = CONFIGS["audioldm2"]
ONNX_MODELS = [name for name, config in CONFIGS.items() if config.backend == "onnxruntime"]


def test_the_public_tensors_are_those_of_the_contract():
    assert signature(ENSEMBLE.input) == {
        "prompt": ("TYPE_STRING", (-1,)),
        "negative_prompt": ("TYPE_STRING", (-1,)),
        "num_inference_steps": ("TYPE_INT32", (1,)),
        "guidance_scale": ("TYPE_FP32", (1,)),
        "guidance_start": ("TYPE_FP32", (1,)),
        "guidance_end": ("TYPE_FP32", (1,)),
        "audio_length_in_s": ("TYPE_FP32", (1,)),
        "num_waveforms_per_prompt": ("TYPE_INT32", (1,)),
        "seed": ("TYPE_INT64", (1,)),
        "scheduler": ("TYPE_STRING", (1,)),
        "eta": ("TYPE_FP32", (1,)),
    }
    assert signature(ENSEMBLE.output) == {
        "audio": ("TYPE_FP32", (-1, -1)),
        "sampling_rate": ("TYPE_INT32", (1,)),
        "used_seed": ("TYPE_INT64", (1,)),
        "clap_score": ("TYPE_FP32", (-1,)),
        "truncated_tokens": ("TYPE_INT32", (-1,)),
    }
    assert ENSEMBLE.max_batch_size == 0


def test_every_input_may_be_missing_so_that_the_tokenizer_is_asked():
    # Where one that is required is missing and another is there, Triton ends in an "unexpected deadlock".
    for ensemble in (ENSEMBLE, CONFIGS["audioldm2_cached"]):
        assert [tensor.name for tensor in ensemble.input if not tensor.optional] == []


def test_the_last_step_gives_all_outputs():
    # Triton leaves out the steps that don't lead to the outputs asked for, and then ends in an "unexpected deadlock".
    for ensemble in (ENSEMBLE, CONFIGS["audioldm2_cached"]):
        last = ensemble.ensemble_scheduling.step[-1]
        assert set(last.output_map.values()) == {tensor.name for tensor in ensemble.output}


def test_every_edge_of_the_ensemble_has_one_type_and_shape_at_both_ends():
    edges = {name: {end} for name, end in signature((*ENSEMBLE.input, *ENSEMBLE.output)).items()}
    for step in ENSEMBLE.ensemble_scheduling.step:
        model = CONFIGS[step.model_name]
        ends = (
            (step.input_map, signature(model.input, model.max_batch_size)),
            (step.output_map, signature(model.output, model.max_batch_size)),
        )
        for mapping, tensors in ends:
            for tensor, edge in mapping.items():
                edges.setdefault(edge, set()).add(tensors[tensor])
    assert {edge: ends for edge, ends in edges.items() if len(ends) != 1} == {}


def test_the_cached_ensemble_is_the_other_one():
    cached = CONFIGS["audioldm2_cached"]
    assert signature(cached.input) == signature(ENSEMBLE.input)
    assert signature(cached.output) == signature(ENSEMBLE.output)
    (step,) = cached.ensemble_scheduling.step
    assert dict(step.input_map) == {tensor.name: tensor.name for tensor in ENSEMBLE.input}
    assert dict(step.output_map) == {tensor.name: tensor.name for tensor in ENSEMBLE.output}


def test_only_texts_and_the_answers_of_the_cached_ensemble_are_cached():
    cached = {name for name, config in CONFIGS.items() if config.response_cache.enable}
    assert cached == {"text_encoder", "gpt2", "audioldm2_cached"}


def test_no_two_steps_of_an_ensemble_run_at_the_same_time():
    # Triton 2.51 sometimes stalled, and died, with two steps at once (docs/architecture.md).
    for ensemble in (ENSEMBLE, CONFIGS["audioldm2_cached"]):
        made: set[str] = set()
        for step in ensemble.ensemble_scheduling.step:
            assert not made or made & set(step.input_map.values()), step.model_name
            made = set(step.output_map.values())


def test_every_step_gets_all_of_its_inputs():
    for step in ENSEMBLE.ensemble_scheduling.step:
        assert set(step.input_map) == {tensor.name for tensor in CONFIGS[step.model_name].input}, step.model_name


def test_optional_inputs_of_the_tokenizer_are_those_of_the_ensemble():
    optional = {tensor.name: tensor.optional for tensor in ENSEMBLE.input}
    assert {tensor.name: tensor.optional for tensor in CONFIGS["tokenizer"].input} == optional


def test_backends_are_onnxruntime_and_python_only():
    backends = {name: config.backend or config.platform for name, config in CONFIGS.items()}
    assert backends == {
        "audioldm2": "ensemble",
        "audioldm2_cached": "ensemble",
        "tokenizer": "python",
        "text_encoder": "onnxruntime",
        "gpt2": "onnxruntime",
        "unet": "python",
        "vae": "onnxruntime",
        "vocoder": "onnxruntime",
        "postprocess": "python",
        "clap_audio": "onnxruntime",
        "jobs": "python",
    }


@pytest.mark.parametrize("name", ONNX_MODELS)
def test_onnx_models_set_no_option_that_the_native_backend_could_refuse(name):
    known = {"name", "backend", "max_batch_size", "input", "output", "instance_group", "dynamic_batching"}
    known |= {"response_cache", "parameters", "optimization"}
    assert {field.name for field, _ in CONFIGS[name].ListFields()} <= known
    native = {"gpu_mem_limit", "arena_extend_strategy", "cudnn_conv_algo_search"}
    assert set(CONFIGS[name].parameters) <= native | {"memory.enable_memory_arena_shrinkage"}


@pytest.mark.parametrize("name", ONNX_MODELS)
def test_no_option_stands_where_the_native_backend_overwrites_it(name):
    # https://github.com/triton-inference-server/server/issues/8808
    overwritten = {"gpu_mem_limit", "arena_extend_strategy", "cudnn_conv_algo_search", "do_copy_in_default_stream"}
    for accelerator in CONFIGS[name].optimization.execution_accelerators.gpu_execution_accelerator:
        assert accelerator.name == "cuda"
        assert not overwritten & set(accelerator.parameters)


def test_each_model_has_one_instance():
    groups = {name: [group.count for group in config.instance_group] for name, config in CONFIGS.items()}
    del groups["audioldm2"], groups["audioldm2_cached"]
    assert set(map(tuple, groups.values())) == {(1,)}, "two instances would be two processes with all the weights"


def test_each_config_names_its_folder():
    assert {folder: config.name for folder, config in CONFIGS.items()} == {folder: folder for folder in CONFIGS}


def test_rows_of_the_largest_request_fit_into_the_text_stages():
    max_num_prompts = int(CONFIGS["tokenizer"].parameters["max_num_prompts"].string_value)
    for name in ("text_encoder", "gpt2"):
        assert 2 * max_num_prompts <= CONFIGS[name].max_batch_size


def test_nothing_in_the_repository_knows_where_it_runs():
    committed = [path for pattern in ("*/config.pbtxt", "*/1/*.py") for path in REPOSITORY.glob(pattern)]
    assert committed
    assert [path for path in committed if "embedded" in path.read_text().lower()] == []


@pytest.mark.parametrize("name", ONNX_MODELS)
def test_exported_files_have_the_names_types_and_open_sizes_of_their_config(name, exported_repository):
    model = onnx.load(exported_repository / name / "1" / "model.onnx", load_external_data=False)
    config = CONFIGS[name]
    for values, tensors in ((model.graph.input, config.input), (model.graph.output, config.output)):
        expected = {
            tensor: (triton_to_np_dtype(kind.removeprefix("TYPE_")), len(dims))
            for tensor, (kind, dims) in signature(tensors, config.max_batch_size).items()
        }
        assert {value.name: onnx_signature(value) for value in values} == expected
        for value in values:
            assert not any(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim), value.name


def onnx_signature(value: onnx.ValueInfoProto) -> tuple[type, int]:
    tensor = value.type.tensor_type
    return tensor_dtype_to_np_dtype(tensor.elem_type).type, len(tensor.shape.dim)


@pytest.mark.parametrize("name", ONNX_MODELS)
def test_exported_files_can_be_read_by_the_oldest_supported_server(name, exported_repository):
    model = onnx.load(exported_repository / name / "1" / "model.onnx", load_external_data=False)
    assert model.ir_version <= 10
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}
