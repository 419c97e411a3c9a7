"""Places in a row, given to whoever needs some next to one another, and given back."""


class SpanAllocator:
    """Hands out spans of consecutive places, the first that fit.

    Args:
        size: How many places there are.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = [range(size)]

    def has(self, count: int) -> bool:
        """Say whether there is a gap of `count` places."""
        return any(len(gap) >= count for gap in self._free)

    def take(self, count: int) -> range:
        """Return `count` places, at least 1.

        Raises:
            LookupError: No gap is as long.
        """
        for index, gap in enumerate(self._free):
            if len(gap) >= count:
                self._free[index : index + 1] = [gap[count:]] if len(gap) > count else []
                return gap[:count]
        raise LookupError(f"no gap has {count} places")

    def give_back(self, span: range) -> None:
        """Take places back that were handed out."""
        self._free = _merged([*self._free, span])

    def grow(self, size: int) -> None:
        """Have more places, behind those that there are."""
        self.give_back(range(self.size, size))
        self.size = size


def _merged(gaps: list[range]) -> list[range]:
    merged: list[range] = []
    for gap in sorted(gaps, key=lambda gap: gap.start):
        if merged and merged[-1].stop == gap.start:
            merged[-1] = range(merged[-1].start, gap.stop)
        else:
            merged.append(gap)
    return merged
