"""Triton alone, which nobody looks after: for tests of what dies, and of what notices that."""

from pathlib import Path
from typing import Any

from server import EmbeddedServer
from server.installation import Installation


class UnkeptServer(EmbeddedServer):
    """An embedded server without a front, which isn't started again."""

    def __init__(self, model_repository: Path, **options: Any) -> None:
        super().__init__(model_repository, front=False, **options)

    def _keep(self, installation: Installation) -> None:
        """Do nothing."""
