"""The options of a generation, each in one place: its Python type, its tensor, what it means, and its other names.

The clients' signatures, the request on the wire, the command line, the page and the tables of `docs/client.md` follow
from this list, or are checked against it by a test.
"""

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, TypeVar, cast

F = TypeVar("F", bound=Callable[..., object])

_PYTHON_TYPES: dict[str, type[int] | type[float] | type[str]] = {
    "INT32": int,
    "INT64": int,
    "FP32": float,
    "BYTES": str,
}


@dataclass(frozen=True, kw_only=True)
class Option:
    """What is known of an option besides its name and its Python type.

    Defaults and bounds are those of an unchanged server. The client sends neither: it leaves out what isn't given, and
    the server checks what is.

    Attributes:
        datatype: Triton's name of the tensor's type.
        one_per_prompt: whether it may hold a value for each prompt (shape [-1]); otherwise it holds one (shape [1]).
        meaning: what it does, for help texts and documents.
        unit: of its values.
        minimum: the smallest value allowed; None where there is none.
        maximum: the largest value allowed; None where only the tensor's type sets one.
        default: what holds where the option isn't given.
        suggestions: values to choose from on the page, which takes others too.
        flag: the option of the command line.
        metavar: its value in the command's help.
        label: of its field on the page; "" where it has none.
    """

    datatype: Literal["BYTES", "INT32", "INT64", "FP32"]
    one_per_prompt: bool = False
    meaning: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    default: str
    suggestions: tuple[str, ...] = ()
    flag: str
    metavar: str
    label: str = ""

    @property
    def python_type(self) -> type[int | float | str]:
        """The type that one value has in Python, and that its text is converted to."""
        return _PYTHON_TYPES[self.datatype]

    @property
    def values(self) -> str:
        """Unit and range in words; "" where there are none."""
        if self.minimum is None:
            return "one text, or one per prompt" if self.one_per_prompt else ""
        bounds = f"{self.minimum:g} and up" if self.maximum is None else f"{self.minimum:g} to {self.maximum:g}"
        return f"{self.unit}, {bounds}" if self.unit else bounds

    @property
    def help(self) -> str:
        """What it does, and which values it may have."""
        return f"{self.meaning} ({self.values})" if self.values else self.meaning


SCHEDULER_ALIASES = (
    *("ddim", "ddpm", "pndm", "lms", "lms-karras", "euler", "euler-karras", "euler-a", "heun", "heun-karras"),
    *("dpm2", "dpm2-karras", "dpm2-a", "dpm2-a-karras", "dpm++2m", "dpm++2m-karras", "dpm++2m-sde"),
    *("dpm++2m-sde-karras", "dpm++2s", "dpm++2s-karras", "dpm++sde", "dpm++sde-karras", "deis", "deis-karras"),
    *("unipc", "unipc-karras", "edm-euler"),
)
"""The server's, in its order."""


class GenerationOptions(TypedDict, total=False):
    """The optional arguments of `generate` and `submit`, for wrappers around them: `**options: Unpack[...]`.

    What is left out, or None, isn't sent: the server's default holds.
    """

    negative_prompt: Annotated[
        str | Sequence[str] | None,
        Option(
            datatype="BYTES",
            one_per_prompt=True,
            meaning="what not to hear",
            default="none",
            flag="--negative-prompt",
            metavar="TEXT",
            label="Negative prompt",
        ),
    ]
    audio_length_in_s: Annotated[
        float | None,
        Option(
            datatype="FP32",
            meaning="length of the audio",
            unit="seconds",
            minimum=0.04,
            maximum=160,
            default="10.24",
            flag="--length",
            metavar="SECONDS",
            label="Length, seconds",
        ),
    ]
    num_inference_steps: Annotated[
        int | None,
        Option(
            datatype="INT32",
            meaning="denoising steps of the scheduler; more of them take longer and sound better",
            minimum=1,
            maximum=1000,
            default="20",
            flag="--steps",
            metavar="N",
            label="Steps",
        ),
    ]
    guidance_scale: Annotated[
        float | None,
        Option(
            datatype="FP32",
            meaning="how closely to follow the prompt; up to 1 there is no guidance",
            minimum=0,
            default="3.5",
            flag="--guidance-scale",
            metavar="X",
            label="Guidance",
        ),
    ]
    scheduler: Annotated[
        str | None,
        Option(
            datatype="BYTES",
            meaning="class name of diffusers, or an alias such as euler-karras",
            default="DPMSolverMultistepScheduler",
            suggestions=SCHEDULER_ALIASES,
            flag="--scheduler",
            metavar="NAME",
            label="Scheduler",
        ),
    ]
    num_waveforms_per_prompt: Annotated[
        int | None,
        Option(
            datatype="INT32",
            meaning="candidates, best first by CLAP score",
            minimum=1,
            maximum=16,
            default="1",
            flag="--candidates",
            metavar="N",
            label="Candidates",
        ),
    ]
    seed: Annotated[
        int | None,
        Option(
            datatype="INT64",
            meaning="equal seeds give equal audio",
            minimum=0,
            default="random",
            flag="--seed",
            metavar="N",
            label="Seed",
        ),
    ]
    guidance_start: Annotated[
        float | None,
        Option(
            datatype="FP32",
            meaning="part of the steps before which there is no guidance",
            minimum=0,
            maximum=1,
            default="0",
            flag="--guidance-start",
            metavar="X",
            label="Guidance from, 0 to 1",
        ),
    ]
    guidance_end: Annotated[
        float | None,
        Option(
            datatype="FP32",
            meaning="part of the steps after which there is no guidance; steps without it take less time",
            minimum=0,
            maximum=1,
            default="1",
            flag="--guidance-end",
            metavar="X",
            label="Guidance until, 0 to 1",
        ),
    ]
    eta: Annotated[
        float | None,
        Option(
            datatype="FP32",
            meaning="noise of the DDIM scheduler; others ignore it",
            minimum=0,
            maximum=1,
            default="0",
            flag="--eta",
            metavar="X",
        ),
    ]


_HINTS = typing.get_type_hints(GenerationOptions, include_extras=True)

OPTIONS: Mapping[str, Option] = {name: hint.__metadata__[0] for name, hint in _HINTS.items()}
"""By argument name, in the order of the form on the page."""


def given_options(values: Mapping[str, Any]) -> GenerationOptions:
    """Return the options among `values` that aren't None."""
    return cast(GenerationOptions, {name: values[name] for name in OPTIONS if values.get(name) is not None})


def lists_options(function: F) -> F:
    """Let `help` and notebooks show every option where the source says `**options: Unpack[GenerationOptions]`.

    A decorator. Type checkers and editors read the source and need none of it.
    """
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint.__origin__)
        for name, hint in _HINTS.items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    if function.__doc__:  # None under `python -OO`
        function.__doc__ = re.sub(r"^( *)\*\*options:.*$", _describe_options, function.__doc__, flags=re.MULTILINE)
    return function


def _describe_options(line: re.Match[str]) -> str:
    return "\n".join(f"{line[1]}{name}: {option.help}; default: {option.default}." for name, option in OPTIONS.items())
