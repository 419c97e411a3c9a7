"""Whether the connection of a silent HTTP request is lost, judged by what the model `jobs` says on other ones. Pure."""

from audioldm2_client._exceptions import AudioLDM2Error, DeadlineExceededError, ServerUnreachableError
from audioldm2_client._jobs import Progress

OVER = ("done", "failed", "cancelled")

LOOKS_WITHOUT_A_SIGN = 4
"""So many looks in a row without a sign of life mean that the connection is lost."""


class Silence:
    """What was seen of one request while its answer didn't come.

    A look that fails says something only where an earlier one was answered: a relay may let a single connection
    through. So does a server which doesn't know the request: behind a load balancer it may be another one.
    """

    def __init__(self) -> None:
        self._received = 0
        self._was_over = False
        self._was_answered = False
        self._was_known = False
        self._without_a_sign = 0

    def look(self, outcome: Progress | AudioLDM2Error, received: int) -> str | None:
        """Return why the connection must be lost; None where it may be alive.

        Args:
            outcome: what `jobs` says about the request, or how asking it failed.
            received: bytes that have arrived of the request's answer.
        """
        stalled, self._received = received == self._received, received
        if isinstance(outcome, Progress):
            over = outcome.state in OVER
            if over and self._was_over and stalled:
                return f"the server says {outcome.state!r}, and its answer doesn't come"
            self._was_over = over
        self._without_a_sign = self._without_a_sign + 1 if stalled and self._is_without_a_sign(outcome) else 0
        if self._without_a_sign >= LOOKS_WITHOUT_A_SIGN:
            known = isinstance(outcome, Progress)
            return "the server doesn't know the request any more" if known else "the server doesn't answer any more"
        return None

    def _is_without_a_sign(self, outcome: Progress | AudioLDM2Error) -> bool:
        if isinstance(outcome, Progress):
            self._was_answered = True
            self._was_known = self._was_known or outcome.state != "unknown"
            return self._was_known and outcome.state == "unknown"
        unanswered = isinstance(outcome, (ServerUnreachableError, DeadlineExceededError))
        self._was_answered = self._was_answered or not unanswered
        return self._was_answered and unanswered
