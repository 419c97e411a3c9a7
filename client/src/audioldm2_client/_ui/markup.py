"""Progress, errors and results as HTML. Pure; every text from outside is escaped."""

from html import escape

from audioldm2_client._jobs import Progress
from audioldm2_client._ui.session import Clip, Entry

RESULTS_PATH = "/results/"

STYLE = """
footer { display: none !important; }
.status { min-height: 3.5em; }
.status progress { width: 100%; height: 0.6em; accent-color: var(--color-accent); }
.status .error { color: var(--error-text-color); white-space: pre-wrap; }
.clip { margin: 0 0 1.2em; }
.clip figcaption { display: flex; justify-content: space-between; margin-bottom: 0.3em; }
.clip audio { width: 100%; display: block; }
.clip img { width: 100%; height: 140px; display: block; margin-top: 0.4em; image-rendering: auto; }
.clip .axis { display: flex; justify-content: space-between; font-size: 0.75em; opacity: 0.7; }
"""


def progress(seen: Progress | None) -> str:
    """Show the progress of a generation; None where the server hasn't told it (yet)."""
    if seen is None or seen.state == "unknown":
        return _status("<progress></progress>", "generating")
    if seen.state == "queued":
        ahead = f", {seen.requests_ahead} ahead" if seen.requests_ahead else ""
        return _status("<progress></progress>", f"queued{ahead}")
    if seen.state == "denoising" and seen.total_steps:
        bar = f'<progress value="{seen.step}" max="{seen.total_steps}"></progress>'
        return _status(bar, f"denoising, step {seen.step} of {seen.total_steps}")
    return _status('<progress value="1" max="1"></progress>' if seen.state == "decoding" else "", seen.state)


def done(entry: Entry) -> str:
    """Say that it is done, and with which seed."""
    words = f"done in {entry.elapsed_s:.1f} s, seed {entry.options['seed']}"
    if entry.truncated_tokens:
        words += f"; the prompt is too long: its last {entry.truncated_tokens} tokens had no effect"
    return _status("", words)


def cancelled() -> str:
    """Say that it was cancelled."""
    return _status("", "cancelled")


def failure(reason: object) -> str:
    """Say why there is no result."""
    return f'<div class="status"><div class="error" role="alert">{escape(str(reason).strip())}</div></div>'


def results(entry: Entry) -> str:
    """Show the waveforms: player, spectrogram, and the score where there are several."""
    return "".join(_clip(entry, index, clip) for index, clip in enumerate(entry.clips))


def label(entry: Entry) -> str:
    """Name an entry of the history in a line."""
    prompt = " ".join(str(entry.options["prompt"]).split())
    short = prompt if len(prompt) <= 60 else f"{prompt[:59]}…"
    return f"{entry.number}: {short} ({entry.length_s:.2f} s, seed {entry.options['seed']})"


def _status(bar: str, words: str) -> str:
    return f'<div class="status">{bar}<div role="status">{escape(words)}</div></div>'


def _clip(entry: Entry, index: int, clip: Clip) -> str:
    name = "" if clip.score is None else f"candidate {index + 1}, CLAP score {clip.score:.3f}"
    audio, picture = (escape(RESULTS_PATH + file) for file in (clip.audio, clip.spectrogram))
    top_khz = entry.sampling_rate / 2000
    file = f"audio-{entry.number}-{index + 1}.wav"
    return (
        f'<figure class="clip"><figcaption><span class="score">{name}</span>'
        f'<a href="{audio}" download="{file}">{file}</a></figcaption>'
        f'<audio controls preload="metadata" src="{audio}"></audio>'
        f'<img src="{picture}" alt="spectrogram, 0 to {top_khz:g} kHz">'
        f'<div class="axis"><span>0 s</span><span>0 to {top_khz:g} kHz</span><span>{entry.length_s:.2f} s</span></div>'
        "</figure>"
    )
