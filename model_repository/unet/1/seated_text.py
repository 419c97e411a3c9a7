"""The text of a forward's rows, in tensors that stay where they are: a row's text is written when it gets its seat."""

import itertools

from text_conditioning import MASK_OF_PADDING, Conditioning
from torch import Tensor

_VERSIONS = itertools.count(1)
"""Of all texts together: two never have the same one."""


class SeatedText:
    """Text by seat. Tensors are made at the first write, and replaced by larger ones as needed.

    Attributes:
        version: Another one when they were replaced.
    """

    def __init__(self) -> None:
        self.version = 0
        self._text: Conditioning | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Seats, and T5 states that each has room for."""
        return (0, 0) if self._text is None else tuple(self._text.attention_mask.shape)  # type: ignore[return-value]

    def reserve(self, like: Conditioning, seats: int, tokens: int) -> None:
        """Make room for so many seats and tokens, of the widths and types that `like` has; what is there stays."""
        old_seats, old_tokens = self.size
        if seats <= old_seats and tokens <= old_tokens:
            return
        seats, tokens = max(seats, old_seats), max(tokens, old_tokens)
        new = Conditioning(
            like.generated.new_zeros(seats, *like.generated.shape[1:]),
            like.prompt.new_zeros(seats, tokens, like.prompt.shape[2]),
            like.attention_mask.new_full((seats, tokens), MASK_OF_PADDING),
        )
        if self._text is not None:
            new.generated[:old_seats].copy_(self._text.generated)
            new.prompt[:old_seats, :old_tokens].copy_(self._text.prompt)
            new.attention_mask[:old_seats, :old_tokens].copy_(self._text.attention_mask)
        self._text = new
        self.version = next(_VERSIONS)

    def randomize(self) -> None:
        """Have some text at every seat, for a trial; who is seated must be written again."""
        for tensor in (self._tensors().generated, self._tensors().prompt):
            tensor.normal_()
        self._tensors().attention_mask.fill_(1)

    def view(self, seats: slice, tokens: int) -> Conditioning:
        """Return the text of some seats, not copied; what a text has beyond its own tokens is under the mask."""
        text = self._tensors()
        return Conditioning(text.generated[seats], text.prompt[seats, :tokens], text.attention_mask[seats, :tokens])

    def write(self, seats: Tensor, text: Conditioning) -> None:
        """Write the text of rows into their seats; int64 [rows]."""
        padded = text.padded(self.size[1])
        for kept, new in zip(vars(self._tensors()).values(), vars(padded).values(), strict=True):
            kept.index_copy_(0, seats, new)

    def move(self, old: Tensor, new: Tensor) -> None:
        """Move text from seats to others; int64 [rows] each."""
        for kept in vars(self._tensors()).values():
            kept.index_copy_(0, new, kept.index_select(0, old))

    def _tensors(self) -> Conditioning:
        if self._text is None:
            raise RuntimeError("no seat has been written")
        return self._text
