"""What a forward needs of its rows that the host writes: their text, and where their state is.

It is written when a row gets its seat, into tensors that stay where they are: CUDA graphs have their addresses in them.
"""

import itertools

import torch
from text_conditioning import MASK_OF_PADDING, Conditioning
from torch import Tensor

_VERSIONS = itertools.count(1)
"""Of all that are made: two never have the same one."""

NUM_INDICES = 5
"""Per seat: DenoisingBatch says what they are."""


class SeatedRows:
    """So many seats, each with text of so many tokens. Their text is exactly as wide: nothing recompiles for a stride.

    Args:
        like: Text of any row, for its widths, its type and its device.
        seats: Rows that have room.
        tokens: T5 states that each has.

    Attributes:
        text: Of all seats; what a text has beyond its own tokens is under the mask.
        indices: int64 [5, seats].
        version: Another one for each.
    """

    def __init__(self, like: Conditioning, seats: int, tokens: int) -> None:
        self.text = Conditioning(
            like.generated.new_zeros(seats, *like.generated.shape[1:]),
            like.prompt.new_zeros(seats, tokens, like.prompt.shape[2]),
            like.attention_mask.new_full((seats, tokens), MASK_OF_PADDING),
        )
        self.indices = like.prompt.new_zeros((NUM_INDICES, seats), dtype=torch.int64)
        self.version = next(_VERSIONS)

    def __len__(self) -> int:
        return self.indices.shape[1]

    @property
    def tokens(self) -> int:
        """T5 states that each seat has."""
        return self.text.tokens

    def randomize(self) -> None:
        """Have some text at every seat, for a trial; who is seated must be written again."""
        for tensor in (self.text.generated, self.text.prompt):
            tensor.normal_()
        self.text.attention_mask.fill_(1)

    def text_of(self, seats: slice, tokens: int) -> Conditioning:
        """Return the first tokens of some seats' text, not copied."""
        text = self.text
        return Conditioning(text.generated[seats], text.prompt[seats, :tokens], text.attention_mask[seats, :tokens])

    def write(self, seats: Tensor, text: Conditioning) -> None:
        """Write the text of rows into their seats; int64 [rows]."""
        for kept, new in zip(vars(self.text).values(), vars(text.padded(self.tokens)).values(), strict=True):
            kept.index_copy_(0, seats, new)

    def move(self, old: Tensor, new: Tensor) -> None:
        """Move text from seats to others; int64 [rows] each."""
        for kept in vars(self.text).values():
            kept.index_copy_(0, new, kept.index_select(0, old))
