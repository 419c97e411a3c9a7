"""The one exception that the embedded server raises."""


class ServerError(Exception):
    """The embedded server cannot start, or has died; `str(error)` is a sentence that says why and what to do next.

    Attributes:
        log_tail: The last lines of tritonserver's log where they help, otherwise an empty string.
    """

    def __init__(self, sentence: str, log_tail: str = "") -> None:
        super().__init__(sentence)
        self.log_tail = log_tail
