"""Client of AudioLDM 2 on Triton Inference Server.

from audioldm2_client import AudioLDM2Client

with AudioLDM2Client("localhost:8001") as client:
    client.generate("a dog barking in the rain", seed=7).save("dog.wav")
"""

from audioldm2_client._client import AudioLDM2Client
from audioldm2_client._exceptions import (
    AudioLDM2Error,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    ServerBusyError,
    ServerFaultError,
    ServerUnreachableError,
)
from audioldm2_client._result import GenerationResult

__version__ = "0.1.0"

__all__ = [
    "AudioLDM2Client",
    "AudioLDM2Error",
    "DeadlineExceededError",
    "GenerationResult",
    "InvalidRequestError",
    "ModelNotFoundError",
    "RequestCancelledError",
    "ServerBusyError",
    "ServerFaultError",
    "ServerUnreachableError",
]
