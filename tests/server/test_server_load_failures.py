"""A model that does not load stops the server, and the reason is a sentence that names the model."""

import pytest

from server import EmbeddedServer, ServerError
from tests.helpers import tiny_repository as tiny

pytestmark = pytest.mark.server

FAILING = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        raise pb_utils.TritonModelException("parameter 'beta' must be at most 1, and is 2.")
"""


def load_failure(repository, **options):
    with pytest.raises(ServerError) as caught:
        EmbeddedServer(repository, **{"ready_timeout_s": 60, "stop_timeout_s": 5, **options}).start()
    assert tiny.processes_of(repository) == {}
    return caught.value


def test_every_model_that_fails_is_named_with_its_reason(tmp_path):
    tiny.add_double(tmp_path)
    tiny.add_double(tmp_path, "integers", tiny.DOUBLE_CONFIG.replace("FP32", "INT32"))
    tiny.add_double(tmp_path, "wide", tiny.DOUBLE_CONFIG.replace("dims: [ 3 ]", "dims: [ 4 ]"))
    tiny.add_double(tmp_path, "open", tiny.DOUBLE_CONFIG.replace("dims: [ 3 ]", "dims: [ -1 ]"))
    tiny.add_double(tmp_path, "renamed", tiny.DOUBLE_CONFIG.replace('"y"', '"z"'))
    tiny.add_double(
        tmp_path, "tuned", f'{tiny.DOUBLE_CONFIG}parameters {{ key: "threads" value {{ string_value: "2" }} }}\n'
    )
    tiny.add_python_model(tmp_path, "failing", FAILING, tiny.DOUBLE_CONFIG)
    floats = tiny.tensors("TYPE_FP32 dims: [ -1, 3 ]", "TYPE_FP32 dims: [ -1, 3 ]")
    tiny.add_chain(tmp_path, "chain", floats, [("double", "x=x", "y=mid"), ("failing", "x=mid", "y=y")])
    sentence = str(load_failure(tmp_path))
    assert "Model 'failing' failed to load: parameter 'beta' must be at most 1, and is 2." in sentence
    assert "Model 'integers' failed to load: input 'x' is TYPE_INT32 in config.pbtxt, and tensor(float)" in sentence
    assert "Model 'wide' failed to load: input 'x' has dims [-1, 4]" in sentence
    assert "Model 'open' failed to load: input 'x' has dims [-1, -1]" in sentence
    assert "Model 'renamed' failed to load: config.pbtxt has an output 'z', and the graph has only y" in sentence
    assert "Model 'tuned' failed to load: config.pbtxt has the unknown parameter 'threads'" in sentence
    assert "'double'" not in sentence
    assert "chain" not in sentence, "the ensemble failed as a consequence only"


def test_a_broken_configuration_is_named_with_its_place(tmp_path):
    tiny.add_double(tmp_path, config=tiny.DOUBLE_CONFIG.replace("max_batch_size", "maximum"))
    sentence = str(load_failure(tmp_path))
    assert f"{tmp_path}/double/config.pbtxt" in sentence
    assert 'no field named "maximum"' in sentence


def test_an_unknown_option_of_tritonserver_is_named(tmp_path):
    tiny.add_double(tmp_path)
    assert "unrecognized option '--frobnicate'" in str(load_failure(tmp_path, extra_arguments=("--frobnicate",)))


def test_models_that_take_too_long_are_given_up_with_the_log(tmp_path):
    tiny.add_python_model(tmp_path, "slow", tiny.SLOW_CODE, tiny.DOUBLE_CONFIG)
    error = load_failure(tmp_path, ready_timeout_s=1.5)
    assert "not ready in 1.5 s" in str(error)
    assert "--ready-timeout-s" in str(error)
    assert "loading: slow:1" in error.log_tail
