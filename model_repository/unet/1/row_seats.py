"""Which row of which job sits at which place of a forward.

Rows keep their seats from forward to forward. When some leave, rows from the end take their seats, so that a forward
has no gaps and little is moved. The rows of a waveform stay neighbours, for what they share is computed once.
"""

from dataclasses import dataclass

from denoising_job import Job


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of a job's present forward, by their numbers."""

    job: Job
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class Row:
    """One row of a job, by its number."""

    job: Job
    number: int

    @property
    def waveform(self) -> int:
        """The job's waveform that it is of."""
        return self.number // 2

    @property
    def noise(self) -> int:
        """Which of the two noise predictions it is for: 0 without the prompt, 1 with it."""
        return self.number % 2

    @property
    def prompt(self) -> int:
        """The row of the job's text that it sees; with guidance, those of the negative prompts come first."""
        request = self.job.request
        prompt = self.waveform // (request.num_waveforms // request.num_prompts)
        return request.num_prompts + prompt if request.do_classifier_free_guidance and self.noise else prompt


def rearrange(seated: list[Row], ranges: tuple[RowRange, ...]) -> list[Row]:
    """Return the rows of `ranges` in an order in which few of those that are seated move."""
    wanted = {Row(rows.job, number): None for rows in ranges for number in rows.numbers}
    seats: list[Row | None] = [row if row in wanted else None for row in seated]
    grown = {(row.job, row.waveform) for row in wanted.keys() - seats}  # a waveform with a new row sits down anew
    seats = [None if row and (row.job, row.waveform) in grown else row for row in seats]
    while None in seats:
        group = _last_waveform(seats)
        gap = _first_gap(seats, len(group))
        if gap == len(seats) and None in seats:  # no gap is wide enough: all move up
            seats = [*filter(None, seats), *group]
        else:
            seats[gap : gap + len(group)] = group
    kept = [row for row in seats if row]
    seen = set(kept)
    return kept + [row for row in wanted if row not in seen]


def _last_waveform(seats: list[Row | None]) -> list[Row]:
    """Take the rows of the last waveform off the end, and what is empty behind them."""
    while seats and seats[-1] is None:
        seats.pop()
    group: list[Row] = []
    while seats and (row := seats[-1]) and (not group or (row.job, row.waveform) == (group[0].job, group[0].waveform)):
        group.insert(0, row)
        seats.pop()
    return group


def _first_gap(seats: list[Row | None], length: int) -> int:
    """Return where `length` seats are empty; behind the last one, all are."""
    return next(index for index in range(len(seats) + 1) if not any(seats[index : index + length]))
