"""Which rows move when others come and go."""

import random
from types import SimpleNamespace

import pytest
from row_seats import Row, RowRange, rearrange


def job(rows: int, per_waveform: int = 2) -> SimpleNamespace:
    """Stands for a job with so many rows."""
    waveforms = rows // per_waveform
    return _Job(rows=range(rows) if per_waveform == 2 else range(1, 2 * waveforms, 2))


class _Job(SimpleNamespace):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def all_rows(*jobs) -> tuple[RowRange, ...]:
    return tuple(RowRange(job, job.rows) for job in jobs)


def moved(before: list[Row], after: list[Row]) -> int:
    return sum(row in before and before.index(row) != after.index(row) for row in after)


def test_newcomers_sit_behind_the_others():
    a, b, c = job(2), job(4), job(2)
    seats = rearrange(rearrange([], all_rows(b)), all_rows(a, b, c))
    assert [row.job for row in seats] == [b] * 4 + [a] * 2 + [c] * 2
    assert moved(rearrange([], all_rows(b)), seats) == 0


def test_the_last_ones_take_the_seats_of_those_who_leave():
    a, b, c, d = (job(2) for _ in range(4))
    before = rearrange([], all_rows(a, b, c, d))
    after = rearrange(before, all_rows(b, c, d))
    assert [row.job for row in after] == [d] * 2 + [b] * 2 + [c] * 2
    assert moved(before, after) == 2


def test_rows_of_a_waveform_stay_neighbours_though_the_gap_is_too_small():
    a, b, c = job(1, 1), job(2), job(2)
    after = rearrange(rearrange([], all_rows(b, a, c)), all_rows(b, c))
    assert [(row.job, row.number) for row in after] == [(b, 0), (b, 1), (c, 0), (c, 1)]
    d = job(1, 1)
    before = rearrange([], all_rows(d, b, c))
    after = rearrange(before, all_rows(b, c))
    assert [(row.job, row.number) for row in after] == [(b, 0), (b, 1), (c, 0), (c, 1)]


def test_parts_of_a_job_can_be_seated():
    a, b = job(8), job(2)
    before = rearrange([], (RowRange(a, range(3)), RowRange(b, range(2))))
    after = rearrange(before, (RowRange(a, range(3, 8)),))
    assert {row.number for row in after} == {3, 4, 5, 6, 7}
    assert {row.job for row in after} == {a}


def test_a_waveform_that_gets_its_second_row_late_has_both_beside_each_other():
    a, b = job(2), job(2)
    before = rearrange([], (RowRange(a, range(1, 2)), RowRange(b, range(2))))
    after = rearrange(before, all_rows(a, b))
    assert [(row.job, row.number) for row in after] == [(b, 0), (b, 1), (a, 0), (a, 1)]


@pytest.mark.parametrize("seed", range(20))
def test_whoever_comes_and_goes_each_row_has_one_seat_and_pairs_are_not_parted(seed):
    draw = random.Random(seed)
    jobs, seats = [], []
    for _ in range(60):
        if jobs and draw.random() < 0.45:
            jobs.remove(draw.choice(jobs))
        else:
            per_waveform = draw.choice((1, 2))
            jobs.append(job(draw.randint(1, 3) * per_waveform, per_waveform))
        draw.shuffle(jobs)
        seats = rearrange(seats, all_rows(*jobs))
        assert sorted(map(id, (row.job for row in seats))) == sorted(id(j) for j in jobs for _ in j.rows)
        assert len(set(seats)) == len(seats)
        for seat, row in enumerate(seats):
            if row.number % 2 == 0:
                assert seats[seat + 1] == Row(row.job, row.number + 1)


def test_the_same_rows_keep_their_seats_in_whatever_order_they_are_asked_for():
    a, b, c = job(2), job(2), job(1, 1)
    before = rearrange([], all_rows(a, b, c))
    assert rearrange(before, all_rows(c, a, b)) == before
