"""The examples in the READMEs, run as they stand against a real server (on other ports)."""

import pytest

from tests.helpers.document_examples import blocks, commands, places_of, run_commands, run_python

READMES = ("README.md", "client/README.md")
PYTHON = [code for readme in READMES for code in blocks(readme, "python")]
COMMANDS = [line for readme in READMES for block in blocks(readme, "console") for line in commands(block)]


@pytest.mark.parametrize("code", PYTHON)
def test_python_example_runs(code, triton, tmp_path):
    done = run_python(code, tmp_path, places_of(triton))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dog.wav").stat().st_size > 44


@pytest.mark.parametrize("command", COMMANDS)
def test_command_example_runs(command, triton, tmp_path):
    done = run_commands([command], tmp_path, places_of(triton))
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_there_are_examples_of_each_kind():
    assert len(PYTHON) == 3
    assert {command.split()[0] for command in COMMANDS} == {".venv/bin/audioldm2", "audioldm2", "curl", "printf"}
