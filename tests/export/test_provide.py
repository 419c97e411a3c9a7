"""What `make` exports before it serves: nothing that nobody has asked for, and never noise over real weights."""

from pathlib import Path

import pytest

from export.exported import Exported, code_digest, identity, read_note, write_note
from export.provide import DEMO_CHECKPOINT, make_plan

REPOSITORY, DIGEST = Path("models"), "d1"
DEMO = Exported(identity(DEMO_CHECKPOINT), DIGEST)
OLD_DEMO = Exported(identity(DEMO_CHECKPOINT), "d0")
HUB = Exported("cvssp/audioldm2", DIGEST)
OLD_HUB = Exported("cvssp/audioldm2", "d0")
FOLDER = Exported("/weights/mine", DIGEST)

PLANS = {
    "nothing there": (None, "", DEMO_CHECKPOINT, "holds no checkpoint yet: exporting .demo/checkpoint (random weights"),
    "nothing there, one named": (None, "cvssp/audioldm2", "cvssp/audioldm2", "no checkpoint yet: exporting cvssp/"),
    "the demo's": (DEMO, "", None, "holds "),
    "the demo's, named": (DEMO, DEMO_CHECKPOINT, None, "holds "),
    "the demo's, another named": (DEMO, "cvssp/audioldm2", "cvssp/audioldm2", "exporting cvssp/audioldm2 in its place"),
    "the demo's, by other code": (OLD_DEMO, "", DEMO_CHECKPOINT, "the export has changed: exporting it again"),
    "the hub's": (HUB, "", None, "models holds cvssp/audioldm2."),
    "the hub's, named": (HUB, "cvssp/audioldm2", None, "models holds cvssp/audioldm2."),
    "the hub's, the demo's named": (HUB, DEMO_CHECKPOINT, DEMO_CHECKPOINT, "exporting .demo/checkpoint in its place"),
    "the hub's, by other code": (OLD_HUB, "", None, "exported by other code than this; to export it again: python -m"),
    "the hub's, by other code, named": (OLD_HUB, "cvssp/audioldm2", None, "exported by other code than this"),
    "a folder's, named otherwise": (FOLDER, "/weights/../weights/mine/", None, "holds /weights/mine."),
    "no note": (Exported(), "", None, "holds a checkpoint of which no name was kept, exported by other code"),
    "no note, one named": (Exported(), "cvssp/audioldm2", "cvssp/audioldm2", "exporting cvssp/audioldm2 in its place"),
}


@pytest.mark.parametrize(("held", "wanted", "exported", "said"), PLANS.values(), ids=PLANS)
def test_only_what_was_asked_for_is_exported_and_it_is_said(held, wanted, exported, said):
    plan = make_plan(REPOSITORY, wanted, held, DIGEST)
    assert plan.checkpoint == exported
    assert said in plan.sentence
    assert "\n" not in plan.sentence


def test_the_note_tells_what_was_exported_wherever_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "audioldm2" / "1").mkdir(parents=True)
    assert read_note(tmp_path) is None
    (tmp_path / "vae" / "1").mkdir(parents=True)
    (tmp_path / "vae" / "1" / "model.onnx").touch()
    assert read_note(tmp_path) == Exported()
    (tmp_path / "größer 犬").mkdir()
    monkeypatch.chdir(tmp_path)
    write_note(tmp_path, "größer 犬")
    monkeypatch.chdir("/")
    assert read_note(tmp_path) == Exported(str(tmp_path / "größer 犬"), code_digest())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"checkpoint": "x", "colour": "red"}'])
def test_a_damaged_note_is_none(tmp_path, content):
    for folder in ("audioldm2", "vae"):
        (tmp_path / folder / "1").mkdir(parents=True)
    (tmp_path / "vae" / "1" / "model.onnx").touch()
    (tmp_path / "audioldm2" / "1" / "checkpoint.json").write_text(content)
    assert read_note(tmp_path) == Exported()
