"""The state of each browser tab: its running generation, its history, its files."""

import math
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audioldm2_client import _spectrogram
from audioldm2_client._client import AudioLDM2Client
from audioldm2_client._generation import Generation
from audioldm2_client._result import GenerationResult

MAX_ENTRIES = 20
"""Generations that a tab remembers; the oldest is deleted first, with its files (at most 20 MB: 640 s of audio)."""

MAX_SESSIONS = 100
"""Tabs; the least recently used one is forgotten when there are more."""


@dataclass(frozen=True)
class Clip:
    """One waveform. Its files are named as after `/results/` in their URLs.

    Attributes:
        audio: the WAV file.
        spectrogram: the PNG file.
        score: its CLAP score; None where there was nothing to rank.
    """

    audio: str
    spectrogram: str
    score: float | None


@dataclass(frozen=True)
class Entry:
    """A successful generation.

    Attributes:
        number: counts from 1 in its tab.
        options: the arguments of `generate` that give it again, with the seed.
        clips: best first.
        sampling_rate: Hz.
        length_s: seconds, of each waveform.
        elapsed_s: seconds from sending to the last byte.
        truncated_tokens: tokens at the end of the prompt that had no effect.
    """

    number: int
    options: Mapping[str, Any]
    clips: tuple[Clip, ...]
    sampling_rate: int
    length_s: float
    elapsed_s: float
    truncated_tokens: int


class ClosedSessionError(Exception):
    """The tab was closed."""


class Session:
    """The state of one tab. Safe to use from several threads.

    Attributes:
        entries: the history, oldest first.
    """

    def __init__(self, folder: Path) -> None:
        self.entries: tuple[Entry, ...] = ()
        self._folder = folder
        self._folder.mkdir(mode=0o700)
        self._lock = threading.Lock()
        self._closed = False
        self._running: Generation | None = None

    def start(self, client: AudioLDM2Client, options: Mapping[str, Any]) -> Generation:
        """Start a generation, and cancel one that still runs in this tab.

        Raises:
            ClosedSessionError: the tab was closed.
            AudioLDM2Error, TypeError: as `AudioLDM2Client.submit`.
        """
        with self._lock:
            self._check_open()
            previous, self._running = self._running, client.submit(**options)
            running = self._running
        if previous is not None:
            previous.cancel()
        return running

    def keep(self, result: GenerationResult, options: Mapping[str, Any], elapsed_s: float) -> Entry:
        """Write the files of a result and add it to the history.

        Raises:
            ClosedSessionError: the tab was closed.
            OSError, ValueError, RuntimeError: a file can't be written.
        """
        with self._lock:
            self._check_open()
            entry = Entry(
                number=self.entries[-1].number + 1 if self.entries else 1,
                options={**options, "seed": result.seed},
                clips=tuple(self._write(result, index) for index in range(len(result.audio))),
                sampling_rate=result.sampling_rate,
                length_s=result.audio.shape[1] / result.sampling_rate,
                elapsed_s=elapsed_s,
                truncated_tokens=int(result.truncated_tokens.max()),
            )
            forgotten, self.entries = self.entries[: 1 - MAX_ENTRIES], (*self.entries[1 - MAX_ENTRIES :], entry)
        for clip in (clip for old in forgotten for clip in old.clips):
            for name in (clip.audio, clip.spectrogram):
                (self._folder.parent / name).unlink(missing_ok=True)
        return entry

    def entry(self, number: int) -> Entry | None:
        """Return an entry of the history; None where it was deleted."""
        return next((entry for entry in self.entries if entry.number == number), None)

    def cancel(self) -> None:
        """Cancel the running generation, here and on the server."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None and not running.done():
            running.cancel()

    def close(self) -> None:
        """Cancel the running generation and delete the files."""
        with self._lock:
            self._closed = True
            self.entries = ()
        self.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, result: GenerationResult, index: int) -> Clip:
        audio = self._folder / f"{uuid.uuid4().hex}.wav"
        spectrogram = audio.with_suffix(".png")
        result.save(audio, index)
        _spectrogram.write(spectrogram, result.audio[index])
        score = float(result.clap_scores[index])
        return Clip(
            audio=f"{self._folder.name}/{audio.name}",
            spectrogram=f"{self._folder.name}/{spectrogram.name}",
            score=None if math.isnan(score) else score,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedSessionError


class Sessions:
    """The sessions of all tabs, by the name that Gradio gives to each.

    Args:
        folder: for their files; private, and removed by the caller.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def of(self, tab: str | None) -> Session:
        """Return the session of a tab, created at the first call."""
        name = tab or ""
        forgotten = None
        with self._lock:
            if name not in self._sessions:
                self._sessions[name] = Session(self._folder / uuid.uuid4().hex)
            self._sessions.move_to_end(name)
            if len(self._sessions) > MAX_SESSIONS:
                _, forgotten = self._sessions.popitem(last=False)
            session = self._sessions[name]
        if forgotten is not None:
            forgotten.close()
        return session

    def forget(self, tab: str | None) -> None:
        """Close the session of a tab that was closed."""
        with self._lock:
            session = self._sessions.pop(tab or "", None)
        if session is not None:
            session.close()

    def close(self) -> None:
        """Close all sessions."""
        with self._lock:
            tabs = list(self._sessions)
        for tab in tabs:
            self.forget(tab)

    def file(self, name: str) -> Path | None:
        """Return the path of a result's file, None where there is none. Other files can't be reached."""
        with self._lock:
            entries = [entry for session in self._sessions.values() for entry in session.entries]
        known = {file for entry in entries for clip in entry.clips for file in (clip.audio, clip.spectrogram)}
        return self._folder / name if name in known else None
