"""Client of AudioLDM 2 on Triton Inference Server.

from audioldm2_client import AudioLDM2Client

with AudioLDM2Client("localhost:8001") as client:
    client.generate("a dog barking in the rain", seed=7).save("dog.wav")
"""

from audioldm2_client._async_client import AsyncAudioLDM2Client
from audioldm2_client._async_generation import AsyncGeneration
from audioldm2_client._client import AudioLDM2Client
from audioldm2_client._connection import TlsOptions
from audioldm2_client._exceptions import (
    AccessDeniedError,
    AudioLDM2Error,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    ServerBusyError,
    ServerFaultError,
    ServerUnreachableError,
)
from audioldm2_client._generation import Generation
from audioldm2_client._jobs import JobState, Progress
from audioldm2_client._options import GenerationOptions
from audioldm2_client._result import GenerationResult

__version__ = "0.2.0"

__all__ = [
    "AccessDeniedError",
    "AsyncAudioLDM2Client",
    "AsyncGeneration",
    "AudioLDM2Client",
    "AudioLDM2Error",
    "DeadlineExceededError",
    "Generation",
    "GenerationOptions",
    "GenerationResult",
    "InvalidRequestError",
    "JobState",
    "ModelNotFoundError",
    "Progress",
    "RequestCancelledError",
    "ServerBusyError",
    "ServerFaultError",
    "ServerUnreachableError",
    "TlsOptions",
]
