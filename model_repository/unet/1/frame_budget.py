"""How many rows x latent frames a forward may have: less after memory was short, and more again in time."""

FORWARDS_TO_GROW = 64
"""So many forwards without a shortage, and the budget is doubled."""


class FrameBudget:
    """The budget of a forward.

    Args:
        most: Rows x latent frames, at most; a single row always fits.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._present = most
        self._since_shortage = 0

    @property
    def frames(self) -> int:
        """Rows x latent frames of a forward, at present."""
        return self._present

    def rows(self, frames: int) -> int:
        """Return how many rows of so many frames a forward may have, at least one."""
        return max(1, self._present // frames)

    def shrink(self, failed: int) -> None:
        """Stay at half of a forward for which memory wasn't enough, of so many rows x frames."""
        self._present = max(1, min(self._present, failed // 2))
        self._since_shortage = 0

    def count_forward(self) -> None:
        """Count a forward that had memory enough; what took the memory may be gone by now."""
        if self._present == self._most:
            return
        self._since_shortage += 1
        if self._since_shortage >= FORWARDS_TO_GROW:
            self._present = min(self._most, 2 * self._present)
            self._since_shortage = 0
