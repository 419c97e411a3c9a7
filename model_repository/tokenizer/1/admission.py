"""Decides whether a request is let in, by what is live in the ensemble: before any stage computes for it.

A request occupies text tokens until its text is encoded, rows until it is denoised, and seconds of audio until its
answer is on its way. Of each there is a budget. What would go beyond one is refused at once, so that no stage works for
a request that a later one would refuse.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from request_errors import ServerBusyError

if TYPE_CHECKING:
    from config_parameters import ConfigParameters
    from generation_request import GenerationRequest
    from job_entry import JobRecord

MIN_WAVEFORM_S = 1.0
"""What the shortest waveform counts as: its way through the stages takes time, however little there is to decode."""

SILENCE_S = 60.0
SILENCE_PER_TOKEN_S = 0.02
SILENCE_PER_AUDIO_S = 5.0
"""How long nothing may be heard of a request whose text is encoded, or whose audio is decoded, by the work that is
before it: five times what a machine with two cores takes in the official size. An ONNX stage reports nothing, so that
this is how it is noticed that one has failed, and that nobody works for the request any more."""

GIVEN_UP_SILENCE_S = 1.0
"""In place of SILENCE_S for a request that was cancelled, or whose deadline has passed. Where the caller of a gRPC
request has left, Triton itself ends it between two stages, and tells none of them."""

OVERTAKEN_SILENCE_S = 0.2
"""The same where a later request has come further: the stages keep the order, so none of them has the earlier one."""

LOOP_SILENCE_S = 180.0
"""The same for a request in the denoising loop, which reports every minute (job_entry.HEARTBEAT_S)."""

NEARLY_FULL = 0.95
"""Of a budget: so much of it is live, and hardly any request fits. The front may refuse all of them then by itself."""

_WHAT = {"tokens": "tokens of text to encode", "rows": "rows to denoise", "audio_s": "seconds of audio to deliver"}


@dataclass(frozen=True)
class Load:
    """What a request, or all of them, occupy.

    Attributes:
        tokens: Of text, over all rows of the text stages, padding included.
        rows: Of the UNet's batch.
        audio_s: Seconds of audio, over all waveforms.
    """

    tokens: int = 0
    rows: int = 0
    audio_s: float = 0.0

    def __add__(self, other: "Load") -> "Load":
        return Load(self.tokens + other.tokens, self.rows + other.rows, self.audio_s + other.audio_s)


@dataclass(frozen=True)
class Budgets:
    """How much may be live at a time, from the parameters in `config.pbtxt`.

    Attributes:
        max_live_text_tokens: Of text that isn't encoded.
        max_live_rows: Of the UNet's batch that aren't denoised. The queue of the model `unet` must hold as many.
        max_live_audio_s: Seconds of audio that aren't delivered.
    """

    max_live_text_tokens: int
    max_live_rows: int
    max_live_audio_s: float

    @classmethod
    def from_parameters(cls, parameters: "ConfigParameters") -> "Budgets":
        """Read the `parameters` of config.pbtxt.

        Raises:
            ValueError: One is missing, or not a positive number; the text names it.
        """
        return cls(
            max_live_text_tokens=parameters.count("max_live_text_tokens"),
            max_live_rows=parameters.count("max_live_rows"),
            max_live_audio_s=parameters.number("max_live_audio_s"),
        )

    @property
    def load(self) -> Load:
        """The budgets as a load."""
        return Load(self.max_live_text_tokens, self.max_live_rows, self.max_live_audio_s)

    def check(self, live: Load, request: Load) -> None:
        """Refuse a request beside what is live. Where nothing of a kind is live, as much of it as may be is let in.

        Raises:
            ServerBusyError: A budget would be exceeded.
        """
        for field in fields(Load):
            used, wanted, limit = (getattr(load, field.name) for load in (live, request, self.load))
            if used > 0 and used + wanted > limit:
                raise ServerBusyError(
                    f"the server is full: it has {used:g} {_WHAT[field.name]} of at most {limit:g}, and "
                    f"this request has {wanted:g}: try again later."
                )

    def why_full(self, live: Load) -> str:
        """Return a sentence where there is hardly room for any request; an empty text otherwise."""
        for field in fields(Load):
            used, limit = (getattr(load, field.name) for load in (live, self.load))
            if used >= NEARLY_FULL * limit:
                return f"the server is full: it has {used:g} {_WHAT[field.name]} of at most {limit:g}: try again later."
        return ""


def load_of(request: "GenerationRequest", tokens_per_row: int) -> Load:
    """Return what a request occupies when it is let in.

    Args:
        request: What is asked for.
        tokens_per_row: How many tokens its longest text has, at most: all rows are padded to that.
    """
    rows_per_prompt = 2 if request.do_classifier_free_guidance else 1
    return Load(
        tokens=len(request.prompts) * rows_per_prompt * tokens_per_row,
        rows=request.num_waveforms * rows_per_prompt,
        audio_s=request.num_waveforms * max(request.audio_length_in_s, MIN_WAVEFORM_S),
    )


def occupied(load: Load, record: "JobRecord", is_given_up: bool) -> Load:
    """Return what a request still occupies of what it occupied at first.

    Args:
        load: At first.
        record: Its entry on the job board.
        is_given_up: It was cancelled, or its deadline has passed. It occupies the stage that it is in until that one
            is done with it, and none of the later ones.
    """
    if not record.is_live:
        return Load()
    if not record.times.encoded_s:
        return Load(tokens=load.tokens) if is_given_up else load
    if not record.times.decoding_s:
        return Load(rows=load.rows, audio_s=load.audio_s)
    return Load(audio_s=load.audio_s)


def silence_limit_s(record: "JobRecord", live: Load, is_given_up: bool = False) -> float:
    """Return after how many seconds without a word a live request is given up as lost.

    Args:
        record: Its entry on the job board.
        live: What all requests occupied when it came to the stage; nothing where it is known to wait for none of them.
        is_given_up: It was cancelled, or its deadline has passed.
    """
    silence_s = GIVEN_UP_SILENCE_S if is_given_up else SILENCE_S
    if not record.times.encoded_s:
        return silence_s + SILENCE_PER_TOKEN_S * live.tokens
    if record.times.decoding_s:
        return silence_s + SILENCE_PER_AUDIO_S * live.audio_s
    return LOOP_SILENCE_S
