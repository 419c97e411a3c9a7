"""Figures in the documents are generated from measurements, not typed."""

import json

from benchmarks import report
from benchmarks.parity import DOCUMENT, RESULTS, with_table
from tests.helpers.parity_cases import CASES, TOLERANCE


def test_the_parity_table_is_generated_from_what_was_measured():
    document, results = DOCUMENT.read_text(), json.loads(RESULTS.read_text())
    assert with_table(document, results) == document


def test_every_parity_case_was_measured():
    errors = {(row["group"], row["case"]): row["error"] for row in json.loads(RESULTS.read_text())["errors"]}
    assert list(errors) == [(case.group, case.name) for case in CASES]
    assert max(errors.values()) <= TOLERANCE


def test_the_benchmarks_document_is_generated_from_what_was_measured():
    assert report.make_document() == report.DOCUMENT.read_text()
