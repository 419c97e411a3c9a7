"""The files of the model `unet`: docs/denoising.md lists each of them, below those that it imports."""

import ast
import re

from tests.helpers.triton_configs import REPOSITORY

FOLDER = REPOSITORY / "unet" / "1"
GUIDE = REPOSITORY.parent / "docs" / "denoising.md"


def listed_modules() -> list[str]:
    """Modules in the order of the guide's table."""
    table = GUIDE.read_text().partition("| file | holds |")[2].partition("\n\n")[0]
    first_column = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return re.findall(r"`(\w+)\.py`", "".join(first_column))


def imports_of(module: str) -> set[str]:
    """Names of the modules beside it that a module imports."""
    beside = {path.stem for path in FOLDER.glob("*.py")}
    tree = ast.parse((FOLDER / f"{module}.py").read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names & beside


def all_imports_of(module: str) -> set[str]:
    """The same, with what those import in turn."""
    return {module}.union(*(all_imports_of(name) for name in imports_of(module)))


def test_the_guide_lists_every_file_once():
    assert sorted(listed_modules()) == sorted(path.stem for path in FOLDER.glob("*.py"))


def test_a_file_imports_only_from_those_above_it_in_the_guide():
    order = listed_modules()
    upwards = {(name, used) for name in order for used in imports_of(name) if order.index(used) >= order.index(name)}
    assert upwards == set()


def test_the_unet_and_the_options_do_not_import_the_schedulers():
    schedulers = {"noise_schedulers", "step_table", "scheduler_steps"}
    assert all_imports_of("unet_forward") & schedulers == set()
    assert all_imports_of("loop_options") & schedulers == set()
    assert schedulers < all_imports_of("denoising_job"), "it does find imports"
