"""Which models of a repository people are meant to call."""

from dataclasses import dataclass
from pathlib import Path

from server.checks import config_text, string_field

JOBS = "jobs"


@dataclass(frozen=True)
class PublicModels:
    """The models that can be reached through the front.

    Attributes:
        names: Of all, in order.
        jobs: Of the job boards among them.
    """

    names: tuple[str, ...]
    jobs: tuple[str, ...]


def find_public_models(model_repository: Path) -> PublicModels:
    """Find the ensembles and the job boards; the stages between are internal.

    In a repository without an ensemble, all models are public.
    """
    models = sorted(path.parent for path in model_repository.glob("*/config.pbtxt"))
    jobs = tuple(m.name for m in models if m.name == JOBS or m.name.endswith(f"_{JOBS}"))
    platforms = {m.name: string_field(config_text(m), "platform") for m in models}
    ensembles = [name for name, platform in platforms.items() if platform == "ensemble"]
    return PublicModels(tuple(sorted({*(ensembles or platforms), *jobs})), jobs)
