"""Chapters whose lines run: what they print is what they say."""

import doctest
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_qlora_step_by_step() -> None:
    failed, attempted = doctest.testfile(str(DOCS / "qlora.md"), module_relative=False)
    assert attempted > 40
    assert not failed, "pytest shows above what the lines print"
