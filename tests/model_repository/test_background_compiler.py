"""Shapes are compiled one after the other, and what fails leaves the rest as it is."""

import threading

from background_compiler import BackgroundCompiler
from unet_shapes import FixedShape

SHAPES = [FixedShape(rows, 16, 16) for rows in (2, 1, 4)]
TIMEOUT_S = 30


def compile_all(compile_shape):
    done, reports = [], []
    compiler = BackgroundCompiler(compile_shape, SHAPES, done.append, reports.append)
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

    compiler = BackgroundCompiler(compile_shape, SHAPES, lambda _: None, lambda _: None)
    compiler.close()
    may_go_on.set()
    compiler._thread.join(TIMEOUT_S)
    assert compiled == SHAPES[:1] or compiled == []
