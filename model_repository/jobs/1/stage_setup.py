"""What the Python models of a server have in common at their start: folder, parameters, job board.

A version folder holds all that its model needs, but for what lies here: the other models find this folder by their
parameter `jobs_model`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from config_parameters import ConfigParameters
from job_board import JobBoard, open_board


@dataclass(frozen=True)
class StageSetup:
    """What a stage starts with.

    Attributes:
        folder: Its version folder.
        parameters: Those of its config.pbtxt.
        board: The job board of this server.
    """

    folder: Path
    parameters: ConfigParameters
    board: JobBoard


def set_up_stage(args: Mapping[str, str], warn: Callable[[str], object]) -> StageSetup:
    """Read what Triton passes to `initialize`, and open the job board.

    Args:
        args: Triton's.
        warn: Logs a sentence.

    Raises:
        ValueError: The configuration has no parameter `jobs_model`.
    """
    parameters = ConfigParameters.from_model_config(args["model_config"])
    return StageSetup(
        folder=Path(args["model_repository"]) / args["model_version"],
        parameters=parameters,
        board=open_board(parameters.text("jobs_model"), warn),
    )
