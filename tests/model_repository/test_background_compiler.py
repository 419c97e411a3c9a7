"""Shapes are compiled one after the other, and what fails leaves the rest as it is."""

import threading
import time

from background_compiler import BackgroundCompiler
from unet_shapes import FixedShape

SHAPES = [FixedShape(rows, 16, 16) for rows in (2, 1, 4)]
TIMEOUT_S = 30


def compile_all(compile_shape):
    done, reports = [], []
    compiler = BackgroundCompiler(compile_shape, SHAPES, done.append, reports.append, threading.Lock(), 0)
    compiler._thread.join(TIMEOUT_S)
    assert not compiler._thread.is_alive()
    return done, reports


def test_each_shape_is_reported_when_it_is_done():
    done, reports = compile_all(lambda _: None)
    assert done == SHAPES
    assert [report.partition(" in ")[0] for report in reports] == [
        f"compiled {shape} (rows x frames x tokens)" for shape in SHAPES
    ]


def test_one_that_fails_is_told_and_the_others_are_compiled():
    def fail(shape):
        if shape == SHAPES[1]:
            raise RuntimeError("no memory")

    done, reports = compile_all(fail)
    assert done == [shape for shape in SHAPES if shape != SHAPES[1]]
    assert f"{SHAPES[1]} can't be compiled (RuntimeError: no memory); it runs without." in reports


def test_two_that_fail_end_it():
    def fail(_):
        raise RuntimeError("no compiler")

    done, reports = compile_all(fail)
    assert done == []
    assert len(reports) == 2


def test_it_starts_no_other_shape_once_it_is_closed():
    may_go_on, compiled = threading.Event(), []

    def compile_shape(shape):
        compiled.append(shape)
        may_go_on.wait(TIMEOUT_S)

    compiler = BackgroundCompiler(compile_shape, SHAPES, lambda _: None, lambda _: None, threading.Lock(), 0)
    compiler.close()
    may_go_on.set()
    compiler._thread.join(TIMEOUT_S)
    assert compiled == SHAPES[:1] or compiled == []


def test_it_has_the_gpu_to_itself_while_it_compiles_and_leaves_it_to_others_in_between():
    turn, held, taken = threading.Lock(), [], []
    compiler = BackgroundCompiler(
        lambda _: held.append(turn.locked()), SHAPES, lambda _: None, lambda _: None, turn, pause_s=0.5
    )
    deadline = time.monotonic() + TIMEOUT_S
    while len(taken) < 2 and time.monotonic() < deadline:  # as a loop that looks from time to time
        if len(held) == len(taken) + 1 and turn.acquire(blocking=False):
            taken.append(len(held))
            turn.release()
        time.sleep(0.01)
    compiler._thread.join(TIMEOUT_S)
    assert held == [True] * len(SHAPES)
    assert taken == [1, 2]


def test_it_waits_while_somebody_else_has_the_gpu():
    turn, compiled = threading.Lock(), []
    with turn:
        compiler = BackgroundCompiler(compiled.append, SHAPES, lambda _: None, lambda _: None, turn, 0)
        time.sleep(0.2)
        assert compiled == []
    compiler._thread.join(TIMEOUT_S)
    assert compiled == SHAPES
