"""Places next to one another, handed out and given back."""

import random

import pytest
from span_allocator import SpanAllocator


def test_the_first_gap_that_is_long_enough_is_taken():
    places = SpanAllocator(10)
    first, second, third = places.take(3), places.take(2), places.take(4)
    assert (first, second, third) == (range(3), range(3, 5), range(5, 9))
    places.give_back(second)
    assert places.take(1) == range(3, 4)
    assert not places.has(2)
    with pytest.raises(LookupError, match="no gap has 2 places"):
        places.take(2)
    assert places.take(1) == range(4, 5)
    assert places.take(1) == range(9, 10)


def test_more_places_follow_those_that_there_are():
    places = SpanAllocator(0)
    assert not places.has(1)
    places.grow(4)
    places.take(3)
    places.grow(8)
    assert (places.size, places.take(5)) == (8, range(3, 8))


def test_whatever_comes_and_goes_no_place_is_handed_out_twice_and_none_is_lost():
    draw = random.Random(1)
    places, taken = SpanAllocator(64), []
    for _ in range(2000):
        if taken and draw.random() < 0.5:
            places.give_back(taken.pop(draw.randrange(len(taken))))
        elif places.has(count := draw.randint(1, 9)):
            taken.append(places.take(count))
        held = [place for span in taken for place in span]
        assert len(held) == len(set(held))
    for span in taken:
        places.give_back(span)
    assert places.take(64) == range(64)
