"""What is measured: a checkpoint of random weights, a length of audio, a device. Needs the standard library alone."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        size: Of the checkpoint, `demo` or `full`.
        device: Where it runs.
        length_s: Seconds of audio.
        steps: Of DPM++ 2M.
        profiled_steps: Steps that the profiler looks at.
        tokens: T5 states of a prompt.
        repeats: Of each measurement.
        requests: How many run at once, in rising order, from 1 on.
        half: The type of half precision, by PyTorch's name.
        compile_backend: Of `torch.compile`.
        compile_mode: The same's; empty for its default.
        first_rows: Rows of a forward that are compiled first.
        more_rows: Those that are compiled when time is left.
        work: Folder of all that is made.
    """

    size: str
    device: str
    length_s: float
    steps: int
    profiled_steps: int
    tokens: int
    repeats: int
    requests: tuple[int, ...]
    half: str
    compile_backend: str
    compile_mode: str
    first_rows: tuple[int, ...]
    more_rows: tuple[int, ...]
    work: Path

    @property
    def is_rehearsal(self) -> bool:
        """Whether this is the miniature, on a CPU."""
        return self.device == "cpu"

    @property
    def frames(self) -> int:
        """Latent frames."""
        from export.demo_unet import LATENT_FRAMES_PER_S  # brings PyTorch

        return round(self.length_s * LATENT_FRAMES_PER_S)

    @property
    def unet_folder(self) -> Path:
        """The UNet's weights, in diffusers' layout."""
        return self.work / "unet"

    @property
    def scheduler_folder(self) -> Path:
        """The scheduler's configuration."""
        return self.work / "scheduler"

    @property
    def compile_cache(self) -> Path:
        """What Inductor keeps."""
        return self.work / "inductor"

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Case":
        """Read what `to_json` has written."""
        values = json.loads(text)
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists, "work": Path(values["work"])})


def official_size(work: Path) -> Case:
    """Return the case that the goals are for: 10.24 s, 20 steps, on the first GPU."""
    return Case(
        size="full",
        device="cuda:0",
        length_s=10.24,
        steps=20,
        profiled_steps=4,
        tokens=16,
        repeats=10,
        requests=(1, 4, 16),
        half="float16",
        compile_backend="inductor",
        compile_mode="reduce-overhead",
        first_rows=(2,),
        more_rows=(1, 32, 16, 8),
        work=work,
    )


def miniature(work: Path) -> Case:
    """Return a case that runs the same code on a CPU, without a compiler. Its figures mean nothing."""
    return Case(
        size="demo",
        device="cpu",
        length_s=0.64,
        steps=3,
        profiled_steps=1,
        tokens=16,
        repeats=2,
        requests=(1, 4, 16),
        half="bfloat16",
        compile_backend="eager",
        compile_mode="",
        first_rows=(2,),
        more_rows=(),
        work=work,
    )
