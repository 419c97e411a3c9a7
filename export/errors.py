"""Why an export ends without result; the texts are whole sentences for the person at the shell."""


class ExportError(Exception):
    """Base of the errors below.

    ExportError
    |- CheckpointError    the checkpoint can't be found, or isn't one that can be exported
    |- OutputError        the output folder can't be written
    |- VerificationError  an exported stage disagrees with PyTorch
    """


class CheckpointError(ExportError):
    """The checkpoint can't be found, or isn't one that can be exported; the text says why and what to do."""


class OutputError(ExportError):
    """The output folder can't be written; the text says which folder and why."""


class VerificationError(ExportError):
    """The exported ONNX model disagrees with PyTorch."""
