"""What `make` exports before it serves: nothing that nobody has asked for, and never noise over real weights."""

from pathlib import Path

import pytest

from export.exported import Exported, code_digest, identity, read_record, write_record
from export.model_names import ModelNames
from export.provide import DEMO_CHECKPOINT, make_plan

REPOSITORY, DIGEST, NAMES = Path("models"), "d1", ModelNames()
DEMO = Exported(identity(DEMO_CHECKPOINT), DIGEST)
OLD_DEMO = Exported(identity(DEMO_CHECKPOINT), "d0")
HUB = Exported("cvssp/audioldm2", DIGEST)
OLD_HUB = Exported("cvssp/audioldm2", "d0")
GPU_DEMO = Exported(identity(DEMO_CHECKPOINT), DIGEST, "gpu")
GPU_HUB = Exported("cvssp/audioldm2", DIGEST, "gpu")
FOLDER = Exported("/weights/mine", DIGEST)

PLANS = {
    "nothing there": (None, "", DEMO_CHECKPOINT, "holds no checkpoint yet: exporting .demo/checkpoint (random weights"),
    "nothing there, one named": (None, "cvssp/audioldm2", "cvssp/audioldm2", "no checkpoint yet: exporting cvssp/"),
    "the demo's": (DEMO, "", None, "holds "),
    "the demo's, named": (DEMO, DEMO_CHECKPOINT, None, "holds "),
    "the demo's, another named": (DEMO, "cvssp/audioldm2", "cvssp/audioldm2", "exporting cvssp/audioldm2 in its place"),
    "the demo's, by other code": (
        OLD_DEMO,
        "",
        DEMO_CHECKPOINT,
        "by other code than this: exporting it again for a CPU",
    ),
    "the demo's, for a GPU": (GPU_DEMO, "", DEMO_CHECKPOINT, "exported for a GPU: exporting it again for a CPU."),
    "the hub's, for a GPU": (
        GPU_HUB,
        "",
        None,
        "exported for a GPU; to export it again: python -m export --checkpoint",
    ),
    "the hub's": (HUB, "", None, "models holds cvssp/audioldm2."),
    "the hub's, named": (HUB, "cvssp/audioldm2", None, "models holds cvssp/audioldm2."),
    "the hub's, the demo's named": (HUB, DEMO_CHECKPOINT, DEMO_CHECKPOINT, "exporting .demo/checkpoint in its place"),
    "the hub's, by other code": (OLD_HUB, "", None, "exported by other code than this; to export it again: python -m"),
    "the hub's, by other code, named": (OLD_HUB, "cvssp/audioldm2", None, "exported by other code than this"),
    "a folder's, named otherwise": (FOLDER, "/weights/../weights/mine/", None, "holds /weights/mine."),
    "no record": (Exported(), "", None, "holds a checkpoint of which no name was kept, exported by other code"),
    "no record, one named": (
        Exported(),
        "cvssp/audioldm2",
        "cvssp/audioldm2",
        "exporting cvssp/audioldm2 in its place",
    ),
}


@pytest.mark.parametrize(("held", "wanted", "exported", "said"), PLANS.values(), ids=PLANS)
def test_only_what_was_asked_for_is_exported_and_it_is_said(held, wanted, exported, said):
    plan = make_plan(REPOSITORY, wanted, held, DIGEST, "cpu")
    assert plan.checkpoint == exported
    assert said in plan.sentence
    assert "\n" not in plan.sentence


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with weights and without a record."""
    (tmp_path / "unet" / "1" / "unet").mkdir(parents=True)
    return tmp_path


def test_the_record_tells_what_was_exported(repository):
    assert read_record(repository, NAMES) == Exported()
    write_record(repository, NAMES, identity(str(repository / "größer 犬")), "gpu")
    assert read_record(repository, NAMES) == Exported(str(repository / "größer 犬"), code_digest(), "gpu")


def test_a_target_of_ones_own_is_served_as_it_is_and_named_where_it_is_exported():
    assert make_plan(REPOSITORY, "", GPU_HUB, DIGEST, "gpu").sentence == "models holds cvssp/audioldm2."
    assert make_plan(REPOSITORY, "", HUB, DIGEST, "gpu").sentence.endswith("--output models --target gpu")


def test_a_repository_without_weights_holds_nothing(tmp_path):
    write_record(tmp_path, NAMES, "cvssp/audioldm2", "cpu")
    assert read_record(tmp_path, NAMES) is None


def test_a_folder_is_the_same_wherever_it_is_named_from(tmp_path, monkeypatch):
    (tmp_path / "größer 犬").mkdir()
    monkeypatch.chdir(tmp_path)
    assert identity("größer 犬") == identity("./größer 犬/") == str(tmp_path / "größer 犬")
    assert identity("cvssp/audioldm2") == "cvssp/audioldm2"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"checkpoint": "x", "colour": "red"}'])
def test_a_damaged_record_tells_nothing(repository, content):
    write_record(repository, NAMES, "cvssp/audioldm2", "cpu")
    (repository / "tokenizer" / "1" / "checkpoint.json").write_text(content)
    assert read_record(repository, NAMES) == Exported()
