"""Why a request gets no latents.

DenoisingError
├── InvalidRequestError      the client's fault: tensors that don't fit, numbers out of bounds
│   ├── UnknownSchedulerError
│   └── SchedulerStepsError
├── NonFiniteError           the latents have become infinite or NaN
├── ForwardError             the UNet failed on this request's rows
│   └── ForwardMemoryError   even one row doesn't fit into memory
├── DeviceLostError          the GPU has failed in a way from which the process can't recover
├── StageError               a fault that nobody has foreseen
├── DeadlineError            the client's time is up
├── QueueFullError           too many requests wait already
├── QueueTimeoutError        it has waited for too long
├── RequestCancelledError    the client doesn't want it any more
└── ShutdownError            the server stops
"""

from typing import ClassVar

import torch


class DenoisingError(Exception):
    """A request failed.

    Attributes:
        code: The name of Triton's error code.
        tag: What the message starts with, in brackets.
        outcome: Under which the metrics count it.
    """

    code: ClassVar[str] = "INTERNAL"
    tag: ClassVar[str] = "INTERNAL"
    outcome: ClassVar[str] = "failed"

    @property
    def message(self) -> str:
        """What the client reads."""
        return f"[{self.tag}] {self}"


class InvalidRequestError(DenoisingError):
    """An input has a value that it can't have; the text starts with the input's name."""

    code = tag = "INVALID_ARG"


class UnknownSchedulerError(InvalidRequestError):
    """A class of that name doesn't exist here, or doesn't know an option; the text says which do."""


class SchedulerStepsError(InvalidRequestError):
    """The scheduler can't do that many steps, with this checkpoint's configuration."""


class NonFiniteError(DenoisingError):
    """The latents have become infinite or NaN."""


class ForwardError(DenoisingError):
    """The UNet failed on this request's rows, also alone."""


class ForwardMemoryError(ForwardError):
    """There wasn't memory enough for a single row."""

    code = tag = "UNAVAILABLE"


class DeviceLostError(DenoisingError):
    """The GPU has failed: whatever this process asks of it from now on fails as well."""

    code = tag = "UNAVAILABLE"


class StageError(DenoisingError):
    """A fault that nobody has foreseen."""


class DeadlineError(DenoisingError):
    """The client's time is up."""

    code = "CANCELLED"
    tag = "DEADLINE"
    outcome = "deadline"


class QueueFullError(DenoisingError):
    """Too many requests wait already."""

    code = tag = "UNAVAILABLE"
    outcome = "refused"


class QueueTimeoutError(DenoisingError):
    """It has waited for too long."""

    code = tag = "UNAVAILABLE"
    outcome = "refused"


class RequestCancelledError(DenoisingError):
    """The client doesn't want it any more."""

    code = tag = "CANCELLED"
    outcome = "cancelled"


class ShutdownError(DenoisingError):
    """The server stops."""

    code = tag = "UNAVAILABLE"


def as_denoising_error(error: Exception) -> DenoisingError:
    """Return what a client is told of an exception in the loop."""
    if isinstance(error, torch.OutOfMemoryError):
        return ForwardMemoryError("the device's memory isn't enough for a single row of this length: ask for less.")
    if isinstance(error, DenoisingError):
        return error
    return ForwardError(f"the UNet failed ({type(error).__name__}: {error}).")
