"""The benchmark for GPUs: its rehearsal on the CPU, its budget, its wheels, and what its tables say."""

import json
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import runner as runner_module
from benchmarks.gpu.case import Case, miniature, official_size
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import Runner, Section
from benchmarks.gpu.sections import NOT_REHEARSED, SECTIONS
from benchmarks.gpu.tables import GOALS, NOT_MEASURED, is_correct, make_tables
from benchmarks.gpu.ways import (
    COMPILED_HALF,
    DIFFUSERS_COMPILED,
    DIFFUSERS_FP32,
    DIFFUSERS_HALF,
    EAGER_FP32,
    EAGER_HALF,
    OURS_COMPILED,
    OURS_EAGER,
    OURS_GRAPHS,
    OURS_ONNX,
    OURS_SERVED,
    OURS_TORCH,
)
from benchmarks.gpu.wheels import join_parts, make_environment

ROOT = Path(__file__).resolve().parents[1]
BOTH = ("guided", "unguided")


def rehearse(output: Path, *options: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--output", str(output), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    assert (output / "gpu.md").read_text() in done.stdout
    return json.loads((output / "gpu.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_rehearsal_has_every_figure_and_all_are_correct(tmp_path):
    report = rehearse(tmp_path, "--budget", "1100")
    measured = report["measurements"]
    assert not [section.name for section in SECTIONS if section.name in measured["notes"]], measured["notes"]
    expected = {f"loop/{way}/{kind}/1" for way in (EAGER_FP32, EAGER_HALF, OURS_GRAPHS) for kind in BOTH}
    expected |= {f"loop/{way}/guided/1" for way in (COMPILED_HALF, OURS_COMPILED)}
    expected |= {f"{what}/{OURS_GRAPHS}/{kind}/{n}" for what in ("loop", "staggered") for kind in BOTH for n in (4, 16)}
    expected |= {f"request/{way}" for way in (DIFFUSERS_FP32, DIFFUSERS_HALF, DIFFUSERS_COMPILED, OURS_TORCH)}
    expected |= {f"start/{kind}/the first answer" for kind in ("cold", "warm")}
    expected |= {f"compile/{OURS_COMPILED}, 2 rows, one of 2 at a time", "rate/copy on the device"}
    expected |= {f"stage/{stage}/PyTorch, eager, {dtype}" for stage in ("gpt2", "vae") for dtype in ("fp32", "bf16")}
    expected |= {f"memory/{OURS_GRAPHS}/guided, 16 at once", "memory/vae/weights and activations in half"}
    assert not expected - measured["samples"].keys()
    assert (
        not {f"kernels/{way}/guided/1" for way in (EAGER_HALF, COMPILED_HALF, OURS_GRAPHS)} - measured["facts"].keys()
    )
    assert not {f"{way}/{kind}" for way in (OURS_EAGER, OURS_GRAPHS) for kind in BOTH} - measured["errors"].keys()
    assert {f"{OURS_GRAPHS}/guided/16 at once", f"{OURS_COMPILED}/guided"} <= measured["errors"].keys()
    assert is_correct(measured["errors"])
    titles = [table["title"] for table in report["tables"]]
    assert titles[:2] == ["Goals", "Correctness"]
    assert len(titles) >= 10


@pytest.mark.server
@pytest.mark.timeout(1200)
def test_the_rehearsal_of_what_is_exported_and_served_agrees_with_diffusers(tmp_path):
    measured = rehearse(tmp_path, "--budget", "1100", "--sections", "request", "onnx", "served")["measurements"]
    assert {f"request/{way}" for way in (OURS_ONNX, OURS_SERVED)} <= measured["samples"].keys()
    assert {"stage/vae/ONNX Runtime", "stage/unet/served", f"together/{OURS_SERVED}/16"} <= measured["samples"].keys()
    assert {f"{OURS_ONNX}/audio", f"{OURS_SERVED}/audio"} <= measured["errors"].keys()
    assert measured["errors"][f"{OURS_SERVED}/audio"]["error"] <= 1e-3  # there, all stages are in float32


def test_every_section_comes_after_those_that_it_needs():
    names = [section.name for section in SECTIONS]
    assert len(set(names)) == len(names)
    for number, section in enumerate(SECTIONS):
        assert set(section.after) <= set(names[:number])
    assert set(NOT_REHEARSED) <= set(names)


def test_a_case_survives_the_way_through_json(tmp_path):
    for case in (official_size(tmp_path), miniature(tmp_path)):
        assert Case.from_json(case.to_json()) == case


def run(work: Path, *names: str, budget_s: float = 60.0, **changes: float) -> tuple[dict, bool]:
    """Run sections of tests/helpers/benchmark_sections.py by their names; return what was measured."""
    sections = [Section(name, f"tests.helpers.benchmark_sections:{name}", **changes) for name in names]
    return run_sections(work, sections, budget_s)


def run_sections(work: Path, sections: list[Section], budget_s: float = 60.0) -> tuple[dict, bool]:
    deadline = time.time() + budget_s
    Results.begin(work, deadline)
    case = replace(miniature(work), device="cuda:0")  # the runner itself uses no device
    no_failure = Runner(case, work, deadline, preload=()).run(sections)
    return json.loads((work / "gpu.json").read_text())["measurements"], no_failure


def test_a_section_that_fails_or_cannot_be_done_says_why_and_the_next_goes_on(tmp_path):
    measured, no_failure = run(tmp_path, "refuse", "import_what_is_missing", "fail", "measure")
    assert not no_failure
    assert measured["notes"] == {
        "refuse": ["not possible here: a package isn't installed."],
        "import_what_is_missing": ["not possible here: No module named 'a_package_that_nobody_has'."],
        "fail": ["failed: ValueError: this can't be measured"],
    }
    assert measured["samples"]["a figure"] == {"values": [1.0], "unit": "s"}


def test_a_section_ends_by_itself_at_the_end_of_the_budget(tmp_path):
    measured, no_failure = run(tmp_path, "measure_for_ever", budget_s=3, needs_s=0.1)
    assert no_failure
    assert measured["notes"]["measure_for_ever"][0].startswith("cut short")
    assert measured["samples"]["the last figure"]["values"] == [3.0]


def test_a_section_that_hangs_is_ended_and_what_it_had_measured_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "GRACE_S", 0.5)
    measured, no_failure = run(tmp_path, "measure_and_hang", "measure", budget_s=3, needs_s=0.1)
    assert no_failure
    assert measured["samples"]["an early figure"]["values"] == [2.0]
    assert measured["notes"]["measure_and_hang"][0].startswith("ended")
    assert measured["notes"]["measure"] == ["left out: 0 s were left of the budget."]


def test_a_section_without_what_it_needs_is_left_out(tmp_path):
    first = Section("fail", "tests.helpers.benchmark_sections:fail")
    second = Section("measure", "tests.helpers.benchmark_sections:measure", after=("fail",))
    measured, _ = run_sections(tmp_path, [first, second])
    assert measured["notes"]["measure"] == ["left out: fail isn't there."]


def test_what_goes_on_behind_is_waited_for_by_those_who_need_it(tmp_path):
    module = "tests.helpers.benchmark_sections"
    behind = Section("write_file", f"{module}:write_file", is_behind=True)
    measured, no_failure = run_sections(tmp_path, [behind, Section("read_file", f"{module}:read_file")])
    assert no_failure
    assert measured["facts"]["file"] == "written behind"
    broken = Section("fail", f"{module}:fail", is_behind=True)
    measured, _ = run_sections(tmp_path, [broken, Section("waits", f"{module}:wait_for_failure")])
    assert measured["notes"]["waits"] == ["not possible here: fail: failed: ValueError: this can't be measured."]


def make_wheel(folder: Path, name: str, tag: str = "py3-none-any") -> Path:
    """Write a wheel with one module, whose `VALUE` is its name."""
    path, info = folder / f"{name}-1.0-{tag}.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"VALUE = {name!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def split(path: Path, size: int) -> list[Path]:
    """Replace a file by its parts, as `split -d` names them."""
    data, parts = path.read_bytes(), []
    for number, start in enumerate(range(0, len(data), size)):
        parts.append(path.with_name(f"{path.name}.part-{number:02}"))
        parts[-1].write_bytes(data[start : start + size])
    path.unlink()
    return parts


@pytest.mark.slow
def test_wheels_in_one_piece_and_in_parts_are_installed_over_what_is_there(tmp_path):
    wheels, work = tmp_path / "wheels", tmp_path / "work"
    wheels.mkdir()
    work.mkdir()
    make_wheel(wheels, "whole_thing")
    make_wheel(wheels, "of_another_machine", "cp311-cp311-win_amd64")
    assert len(split(make_wheel(wheels, "thing_in_parts"), 200)) > 2
    python, missing = make_environment(work / "environment", join_parts(wheels, work))
    assert [sentence.partition("-")[0] for sentence in missing] == ["of_another_machine"]
    code = "import pytest, thing_in_parts, whole_thing; print(thing_in_parts.VALUE, whole_thing.VALUE)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "thing_in_parts whole_thing\n"


def test_a_part_that_is_missing_is_named(tmp_path):
    split(make_wheel(tmp_path, "thing"), 200)[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"thing-1.0-py3-none-any.whl.part-01 is missing"):
        join_parts(tmp_path, tmp_path)


def test_goals_are_met_missed_or_not_measured():
    def goals(**seconds: float) -> list[str]:
        names = {
            "eager": f"loop/{EAGER_FP32}/guided/1",
            "ours": f"loop/{OURS_COMPILED}/guided/1",
            "many": f"loop/{OURS_COMPILED}/guided/16",
            "cold": "start/cold/the first answer",
        }
        samples = {names[key]: {"values": [value], "unit": "s"} for key, value in seconds.items()}
        table = next((table for table in make_tables(samples, {}, {}, {}) if table.title == "Goals"), None)
        assert table is not None
        assert len(table.rows) == len(GOALS)
        return [row[3] or row[2] for row in table.rows]

    assert goals() == [NOT_MEASURED] * 6
    assert goals(eager=0.6, ours=0.099, many=0.5, cold=59.0) == ["met", *[NOT_MEASURED] * 3, "met", "met"]
    assert goals(eager=0.6, ours=0.101, many=0.6, cold=61.0)[::4] == ["**missed**"] * 2
    assert goals(cold=61.0)[-1] == "**missed**"


@pytest.mark.parametrize("error", [0.2, float("nan"), float("inf")])
def test_one_error_above_its_bound_makes_all_incorrect(error):
    right = {"error": 0.01, "bound": 0.1}
    assert is_correct({"a": right})
    assert not is_correct({"a": right, "b": {"error": error, "bound": 0.1}})
