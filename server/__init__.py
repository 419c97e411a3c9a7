"""Triton Inference Server, embedded: run a model repository from the files of the nvidia-pytriton wheel alone."""

from server.embedded import EmbeddedServer
from server.errors import ServerError

__all__ = ["EmbeddedServer", "ServerError"]
