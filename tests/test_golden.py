"""Golden patches: on the kind of machine they were pinned on, every method leaves the bits it left before (`golden.py`)."""

from __future__ import annotations

import json

import golden
import pytest

KEPT = json.loads(golden.PATH.read_text())
HERE = pytest.mark.skipif(KEPT["machine"] != golden.machine(), reason=f"pinned on {KEPT['machine']}; floating-point sums differ between processors")


def test_every_case_is_pinned():
    assert sorted("/".join(case) for case in golden.cases()) == sorted(KEPT["digests"])


@HERE
@pytest.mark.slow
@pytest.mark.parametrize("case", golden.cases(), ids="-".join)
def test_patches_are_golden(case):
    assert golden.digest(*case) == KEPT["digests"]["/".join(case)]
