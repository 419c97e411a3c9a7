"""Sections for a benchmark that only rehearses its runner."""

import importlib
import time

from benchmarks.gpu.case import Case
from benchmarks.gpu.results import NotPossibleError, Results
from benchmarks.gpu.runner import wait_for


def measure(_: Case, results: Results) -> None:
    results.add_one("a figure", 1.0, "s")


def measure_and_hang(_: Case, results: Results) -> None:
    results.add_one("an early figure", 2.0, "s")
    time.sleep(600)


def measure_for_ever(_: Case, results: Results) -> None:
    while True:
        results.add_one("the last figure", 3.0, "s")
        time.sleep(0.05)


def fail(_case: Case, _results: Results) -> None:
    raise ValueError("this can't be measured")


def refuse(_case: Case, _results: Results) -> None:
    raise NotPossibleError("a package isn't installed")


def write_file(case: Case, _: Results) -> None:
    (case.work / "file").write_text("written behind")


def read_file(case: Case, results: Results) -> None:
    wait_for(case, results, "write_file")
    results.add_fact("file", (case.work / "file").read_text())


def wait_for_failure(case: Case, results: Results) -> None:
    wait_for(case, results, "fail")


def import_what_is_missing(_case: Case, _results: Results) -> None:
    importlib.import_module("a_package_that_nobody_has")
