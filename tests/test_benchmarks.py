"""The tools of the benchmarks: what they change and what they measure."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from benchmarks.load import draw_calls, run_open_loop
from benchmarks.process_memory import TreeMemory
from benchmarks.repositories import copy_with, instances, parameter
from tests.helpers.triton_configs import REPOSITORY, read_configs


def parsed(folder) -> ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def test_a_copy_has_the_edits_and_the_original_stays(tmp_path):
    copy = copy_with(
        REPOSITORY,
        tmp_path / "copy",
        {"unet": [parameter("max_rows", "2"), instances(2)], "vae": [parameter("intra_op_thread_count", "1")]},
    )
    unet, vae = parsed(copy / "unet"), parsed(copy / "vae")
    assert unet.parameters["max_rows"].string_value == "2"
    assert unet.instance_group[0].count == 2
    assert vae.parameters["intra_op_thread_count"].string_value == "1"
    assert set(vae.parameters) == {*read_configs()["vae"].parameters, "intra_op_thread_count"}
    assert read_configs()["unet"].parameters["max_rows"].string_value == "32"


def test_equal_seeds_draw_equal_arrivals_of_the_rate():
    calls = draw_calls(5.0, 4000, seed=1)
    assert calls == draw_calls(5.0, 4000, seed=1)
    assert calls != draw_calls(5.0, 4000, seed=2)
    assert np.diff([call.at_s for call in calls]).mean() == pytest.approx(1 / 5.0, rel=0.1)


def test_latencies_count_from_the_planned_arrival():
    calls = draw_calls(100.0, 3, seed=1)
    latencies, total_s = run_open_loop(lambda _: time.sleep(0.2), calls)
    assert [latency >= 0.2 for latency in latencies] == [True] * 3
    assert total_s < 3 * 0.2 + calls[-1].at_s + 0.2  # they overlap


def test_the_memory_of_a_child_is_seen_and_named():
    code = "import sys; block = b'x' * 100_000_000; print(flush=True); sys.stdin.read()"
    with TreeMemory(os.getpid()) as memory:
        before = memory.now()
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            assert memory.now() - before > 90
            child.stdin.close()
    assert memory.peak > 90
