"""Reading a response, and saving audio."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from audioldm2_client import GenerationResult, ServerFaultError
from audioldm2_client._request import build_request
from audioldm2_client._result import parse_response

REQUEST = build_request("x", {}, model_name="audioldm2", request_id="r1", timeout_s=2)


def outputs() -> dict[str, np.ndarray]:
    return {
        "audio": np.array([[0.0, 0.5], [1.0, -1.0]], np.float32),
        "sampling_rate": np.array([16000], np.int32),
        "used_seed": np.array([2**40], np.int64),
        "clap_score": np.array([0.5, np.nan], np.float32),
        "truncated_tokens": np.array([3], np.int32),
    }


def result(samples: list[float] | np.ndarray) -> GenerationResult:
    audio = np.atleast_2d(np.array(samples, np.float32))
    return GenerationResult(audio, 16000, 7, np.full(len(audio), np.nan, np.float32), ("x",), np.zeros(1, np.int32))


def test_response_becomes_the_result():
    tensors = outputs()
    parsed = parse_response(tensors.get, REQUEST)
    assert parsed.audio.dtype == parsed.clap_scores.dtype == np.float32
    np.testing.assert_array_equal(parsed.audio, tensors["audio"])
    np.testing.assert_array_equal(parsed.clap_scores, tensors["clap_score"])
    assert parsed.truncated_tokens.tolist() == [3]
    assert (parsed.sampling_rate, parsed.seed, parsed.prompts) == (16000, 2**40, ("x",))


def test_waveforms_that_were_not_ranked_have_the_score_nan():
    tensors = outputs() | {"clap_score": np.array([-2, -1], np.float32)}
    np.testing.assert_array_equal(parse_response(tensors.get, REQUEST).clap_scores, [np.nan, -1])
    assert tensors["clap_score"][0] == -2, "what arrived was changed"


def test_audio_is_the_callers_own_and_writable():
    tensors = outputs()
    tensors["audio"].flags.writeable = False
    parsed = parse_response(tensors.get, REQUEST)
    parsed.audio[:] = 2
    assert tensors["audio"][0, 1] == 0.5


@pytest.mark.parametrize("name", ["audio", "sampling_rate", "used_seed", "clap_score", "truncated_tokens"])
@pytest.mark.parametrize("bad", [None, np.zeros((0,), np.float32), np.zeros((1, 1, 1), np.float32)])
def test_output_that_breaks_the_contract_is_a_server_fault(name, bad):
    tensors = outputs() | {name: bad}
    with pytest.raises(ServerFaultError, match=rf"output '{name}' .*\(request r1\)"):
        parse_response(tensors.get, REQUEST)


@pytest.mark.parametrize(("name", "subtype"), [("a.wav", "PCM_16"), ("a.FLAC", "PCM_16"), ("a.flac", "PCM_24")])
def test_saved_file_holds_the_waveform(tmp_path, name, subtype):
    wave = np.sin(np.linspace(0, 60, 4000)).astype(np.float32)
    path = result(np.stack([np.zeros_like(wave), wave])).save(tmp_path / name, 1, subtype=subtype)
    info = soundfile.info(path)
    assert (info.format, info.subtype, info.channels, info.samplerate) == (
        name[-4:].strip(".").upper(),
        subtype,
        1,
        16000,
    )
    np.testing.assert_allclose(soundfile.read(path)[0], wave, atol=2**-15)


def test_pcm_clips_and_float_keeps_what_is_beyond_one(tmp_path):
    loud = result([0.25, 1.5, -3.0])
    clipped, _ = soundfile.read(loud.save(tmp_path / "pcm.wav"))
    np.testing.assert_allclose(clipped, [0.25, 1, -1], atol=2**-14)
    kept, _ = soundfile.read(loud.save(tmp_path / "float.wav", subtype="FLOAT"))
    np.testing.assert_array_equal(kept, [0.25, 1.5, -3.0])
    assert loud.audio[0, 1] == 1.5


@pytest.mark.parametrize(
    ("name", "subtype", "error", "sentence"),
    [
        ("a.mp3", "PCM_16", ValueError, r"must end in .wav or .flac; got '.*a\.mp3'"),
        ("noextension", "PCM_16", ValueError, "must end in"),
        ("a.flac", "FLOAT", ValueError, "subtype of a FLAC file must be one of .*PCM_16"),
        ("nosuch/a.wav", "PCM_16", FileNotFoundError, "folder '.*nosuch' doesn't exist; create it first"),
        ("folder.wav", "PCM_16", IsADirectoryError, "is a folder; name a file"),
    ],
)
def test_bad_target_is_refused_and_leaves_nothing(tmp_path, name, subtype, error, sentence):
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(error, match=sentence):
        result([0.0]).save(tmp_path / name, subtype=subtype)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder.wav"]


def test_audio_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="NaN or infinite"):
        result([0.0, np.nan]).save(tmp_path / "a.wav")
    assert not list(tmp_path.iterdir())


def test_index_must_be_a_row(tmp_path):
    with pytest.raises(IndexError, match="one of the 1 waveforms; got 1"):
        result([0.0]).save(tmp_path / "a.wav", 1)


def test_write_that_fails_midway_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")

    def fill_the_disk(file: Path, *_: object, **__: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(soundfile, "write", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        result([0.0]).save(path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.wav", b"old")]


def test_saved_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    saved = result([0.0]).save(str(tmp_path / "a.wav"))
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode
