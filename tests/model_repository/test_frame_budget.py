"""How large a forward may be after memory was short, and later."""

from frame_budget import FORWARDS_TO_GROW, FrameBudget


def count(budget: FrameBudget, forwards: int) -> None:
    for _ in range(forwards):
        budget.count_forward()


def test_a_budget_is_rows_of_a_length_and_at_least_one():
    budget = FrameBudget(4096)
    assert [budget.rows(frames) for frames in (16, 256, 4096, 9999)] == [256, 16, 1, 1]


def test_what_failed_is_halved_and_comes_back_after_a_while():
    budget = FrameBudget(4096)
    budget.shrink(4096)
    assert budget.frames == 2048
    budget.shrink(1024)
    assert budget.frames == 512
    count(budget, FORWARDS_TO_GROW - 1)
    assert budget.frames == 512
    count(budget, 1)
    assert budget.frames == 1024
    count(budget, 10 * FORWARDS_TO_GROW)
    assert budget.frames == 4096, "and no more than it was"


def test_a_small_forward_that_fails_does_not_raise_the_budget_and_never_ends_it():
    budget = FrameBudget(4096)
    budget.shrink(100)
    budget.shrink(4096)
    assert budget.frames == 50
    for _ in range(20):
        budget.shrink(1)
    assert budget.frames == 1
    count(budget, 20 * FORWARDS_TO_GROW)
    assert budget.frames == 4096, "no shortage is for ever"


def test_a_shortage_starts_the_wait_again():
    budget = FrameBudget(4096)
    budget.shrink(4096)
    count(budget, FORWARDS_TO_GROW - 1)
    budget.shrink(2048)
    count(budget, FORWARDS_TO_GROW - 1)
    assert budget.frames == 1024
