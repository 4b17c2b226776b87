"""What a notebook's text claims: said claim by claim, and asserted of the studies it is about."""

from types import SimpleNamespace

import pytest

from optmerge_core.benchmark.shipped import check_claims
from optmerge_core.places import in_checkout

OWN = SimpleNamespace(name="mine", base_model="models/mine/base")
SHIPPED = SimpleNamespace(name="internvl", base_model=in_checkout("data/benchmark/internvl/base"))
CLAIMS = {"a is short": (True, "3 of 10"), "b is long": (False, "2"), "c": False, "d": True}


def test_every_claim_is_said_with_what_was_compared(capsys):
    check_claims(OWN, CLAIMS)
    assert capsys.readouterr().out.splitlines() == [
        "holds: a is short (3 of 10)",
        "does not hold: b is long (2)",
        "does not hold: c",
        "holds: d",
    ]


def test_of_a_study_that_the_texts_are_about_it_must_hold(capsys):
    check_claims(SHIPPED, {"a": (True, "1"), "d": True})
    with pytest.raises(AssertionError, match="^b is long; c$"):
        check_claims(SHIPPED, CLAIMS)
    assert capsys.readouterr().out.count("hold") == 2 + len(CLAIMS)


def test_of_several_studies_one_that_the_texts_are_about_is_enough(capsys):
    check_claims([OWN, OWN], CLAIMS)
    with pytest.raises(AssertionError):
        check_claims([OWN, SHIPPED], CLAIMS)
