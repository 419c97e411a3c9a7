"""What the callers of a soak do: drawn from a seed, and what each may be told in the end."""

import random
from dataclasses import dataclass, field
from enum import StrEnum

from benchmarks.wire import LEFT, OK, PROTOCOLS, TIMED_OUT, Value, WireRequest

PROMPTS = (
    "a dog barking in the rain",
    "church bells ringing far away while a car passes by",
    "a crowd cheering in a stadium, recorded from the stands, with a whistle in the middle of it " * 4,
)
LENGTHS_S = (0.64, 1.28, 2.56)
STEPS = (2, 5, 10, 20)
MOST_PATIENCE_S = 3.0
"""Nobody who leaves or cancels waits for longer."""


class Deed(StrEnum):
    """What a caller does."""

    WAITS = "waits for the audio"
    POLLS = "asks how far it is, and waits"
    CANCELS = "cancels"
    LEAVES = "closes the connection"
    HAS_DEADLINE = "gives the server a timeout"
    GIVES_UP = "has a deadline of its own"
    IS_WRONG = "asks for what can't be had"
    IS_STOPPED = "asks for what the front stops"


_WEIGHTS = {
    Deed.WAITS: 30,
    Deed.POLLS: 10,
    Deed.CANCELS: 15,
    Deed.LEAVES: 20,
    Deed.HAS_DEADLINE: 8,
    Deed.GIVES_UP: 7,
    Deed.IS_WRONG: 6,
    Deed.IS_STOPPED: 4,
}

ALLOWED = {
    # What callers were told, and what the server may have logged of it: an empty text for nothing.
    OK: {"ok"},
    "UNAVAILABLE": {"UNAVAILABLE"},
    "CANCELLED": {"CANCELLED"},
    "DEADLINE": {"DEADLINE"},
    "INVALID_ARG": {"INVALID_ARG"},
    LEFT: {"ok", "CANCELLED", "UNAVAILABLE", ""},
    TIMED_OUT: {"ok", "CANCELLED", "DEADLINE", "UNAVAILABLE", ""},
}
EXPECTED = {
    Deed.WAITS: {OK},
    Deed.POLLS: {OK},
    Deed.CANCELS: {OK, "CANCELLED"},
    Deed.LEAVES: {OK, LEFT},
    Deed.HAS_DEADLINE: {OK, "DEADLINE"},
    Deed.GIVES_UP: {OK, TIMED_OUT},
    Deed.IS_WRONG: {"INVALID_ARG"},
    Deed.IS_STOPPED: {"INVALID_ARG"},
}
"""What callers may be told, besides that there is no room."""


@dataclass(frozen=True)
class Action:
    """One request, and what its caller does with it.

    Attributes:
        deed: What.
        request: As it is sent.
        protocol: `HTTP` or `gRPC`.
        keeps_connection: Whether a connection that was there before is used.
        after_s: When it is done, in seconds after the request was sent.
    """

    deed: Deed
    request: WireRequest = field(repr=False)
    protocol: str
    keeps_connection: bool
    after_s: float


@dataclass(frozen=True)
class Seen:
    """What a caller saw of its request.

    Attributes:
        action: What it did.
        outcome: As in `wire.Answer`.
        sentence: The server's, if it refused.
    """

    action: Action
    outcome: str
    sentence: str = ""

    def problem(self, logged: list[str]) -> str:
        """Say what is wrong with it; an empty text if nothing is.

        Args:
            logged: The reasons that the server has logged for this request.
        """
        allowed = {""} if self.action.deed is Deed.IS_STOPPED else ALLOWED.get(self.outcome, set())
        if self.outcome not in EXPECTED[self.action.deed] | {"UNAVAILABLE"}:
            return f"{self.action}: was told {self.outcome} {self.sentence}"
        if len(logged) > 1 or (logged[0] if logged else "") not in allowed:
            return f"{self.action}: was told {self.outcome}, and the server logged {logged}"
        return ""


def draw_actions(seed: int, count: int, prefix: str) -> list[Action]:
    """Draw what `count` callers do; their requests' ids begin with the prefix."""
    draw = random.Random(seed)
    return [_draw_action(draw, f"{prefix}-{seed}-{number}") for number in range(count)]


def _draw_action(draw: random.Random, request_id: str) -> Action:
    [deed] = draw.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
    after_s = draw.uniform(0, draw.choice((0.05, 0.5, MOST_PATIENCE_S)))  # from each stage, some
    inputs: dict[str, Value | list[str]] = {
        "prompt": [draw.choice(PROMPTS) for _ in range(draw.choice((1, 1, 1, 2)))],
        "num_inference_steps": draw.choice(STEPS),
        "audio_length_in_s": draw.choice(LENGTHS_S),
        "num_waveforms_per_prompt": draw.choice((1, 1, 1, 2)),
        "guidance_scale": draw.choice((1.0, 3.5)),
        "seed": draw.randrange(2**31),
    }
    if deed is Deed.IS_WRONG:
        inputs |= draw.choice(({"num_inference_steps": 0}, {"audio_length_in_s": -1.0}, {"scheduler": "none"}))
    timeout_us = max(1, round(after_s * 1e6)) if deed is Deed.HAS_DEADLINE else 0
    return Action(
        deed=deed,
        request=WireRequest(request_id, inputs, timeout_us),
        protocol=draw.choice(PROTOCOLS),
        keeps_connection=draw.random() < 0.7,
        after_s=after_s,
    )
