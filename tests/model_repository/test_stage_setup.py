"""What the Python models share at their start, and the few lines with which each of them finds it."""

import ast
import json
from pathlib import Path

import job_board
import pytest
from stage_setup import set_up_stage

from tests.helpers.triton_configs import REPOSITORY

STAGES = ("tokenizer", "unet", "postprocess")


def arguments(folder: Path, **parameters: str) -> dict[str, str]:
    """What Triton passes to `initialize`."""
    config = {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}
    return {"model_repository": str(folder), "model_version": "1", "model_config": json.dumps(config)}


def import_lines(stage: str) -> str:
    """Source of the function that an adapter finds the shared modules with."""
    tree = ast.parse((REPOSITORY / stage / "1" / "model.py").read_text())
    [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_set_up"]
    return ast.unparse(function)


def test_a_stage_gets_its_folder_its_parameters_and_the_board(tmp_path, monkeypatch):
    monkeypatch.setattr(job_board, "folder_of", lambda model, server_pid: tmp_path / f"{model} of {server_pid}")
    monkeypatch.setattr(job_board.os, "getppid", lambda: 42)
    warnings: list[str] = []
    stage = set_up_stage(arguments(tmp_path / "unet", jobs_model="own_jobs", max_rows="7"), warnings.append)
    assert stage.folder == tmp_path / "unet" / "1"
    assert stage.parameters.count("max_rows") == 7
    stage.parameters.refuse_others()
    assert (tmp_path / "own_jobs of 42").is_dir()
    assert stage.board.create_entry("a").ticket
    assert warnings == []


def test_a_stage_without_the_name_of_the_jobs_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="parameter jobs_model is missing"):
        set_up_stage(arguments(tmp_path, max_rows="7"), print)


def test_every_stage_finds_the_shared_modules_in_the_same_way():
    assert len({import_lines(stage) for stage in STAGES}) == 1
