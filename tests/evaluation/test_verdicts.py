"""Verdicts on made-up scores of every kind."""

import numpy as np
import pandas as pd
import pytest

from optmerge_core.evaluation.verdicts import (
    FAILS,
    HOLDS,
    UNDECIDED,
    UNTESTABLE,
    Scores,
    average_ranks,
    bootstrap,
    critical_difference,
    every,
    interval,
    sentences,
    some,
    verdict,
    verdict_table,
)

TASKS = ("VQA", "Geometry", "Chart", "OCR", "Grounding")
ABOVE, BELOW, ACROSS = np.linspace(1, 3, 201), np.linspace(-3, -1, 201), np.linspace(-1, 3, 201)


@pytest.mark.parametrize(
    ("lead", "samples", "seeds", "expected", "why"),
    [
        (2, ABOVE, [1, 2, 3], HOLDS, ""),
        (2, ABOVE, [], HOLDS, ""),
        (-2, BELOW, [-1, -2], FAILS, ""),
        (-2, BELOW, [], FAILS, ""),
        (1, ACROSS, [1, 2, 3], UNDECIDED, "the interval contains 0"),
        (1, ACROSS, [], UNDECIDED, "the interval contains 0"),
        (2, ABOVE, [1, -0.1], UNDECIDED, "the seeds do not agree"),
        (2, ABOVE, [-1, -2], UNDECIDED, "the seeds do not agree"),
        (2, ABOVE, [1, 0], UNDECIDED, "the seeds do not agree"),
        (-2, BELOW, [-1, 0.1], UNDECIDED, "the seeds do not agree"),
        (0, np.zeros(10), [0, 0], UNDECIDED, "the interval contains 0"),
        (1, np.linspace(0, 2, 10), [], HOLDS, ""),  # 95 % of it lie above 0
        (9.7, None, [], HOLDS, ""),  # a cost: no questions
        (-9.7, None, [], FAILS, ""),
    ],
)
def test_signs_of_lead_interval_and_seeds_decide(lead, samples, seeds, expected, why):
    found = verdict(lead, samples, seeds)
    assert (found.verdict, found.why) == (expected, why)
    mirror = {HOLDS: FAILS, FAILS: HOLDS, UNDECIDED: UNDECIDED}  # the opposite claim
    turned = None if samples is None else -samples
    assert verdict(-lead, turned, -np.array(seeds)).verdict == mirror[expected]


def test_a_verdict_keeps_what_it_rests_on():
    found = verdict(1.0, ACROSS, [0.5, 2.0])
    assert [found.low, found.high] == pytest.approx([-0.9, 2.9])
    assert (found.lead, found.lowest_seed, found.highest_seed) == (1.0, 0.5, 2.0)
    assert np.isnan([verdict(1.0).low, verdict(1.0, ABOVE).lowest_seed]).all()


def test_what_the_setting_cannot_show_is_not_testable_whatever_its_numbers():
    found = verdict(2, ABOVE, [1], untestable="rank 8 lies below k")
    assert (found.verdict, found.why, found.lead) == (UNTESTABLE, "rank 8 lies below k", 2)
    assert verdict(untestable="no model of mixture training").verdict == UNTESTABLE
    with pytest.raises(ValueError, match="untestable"):
        verdict()


def test_all_and_some_are_decided_by_one_of_the_comparisons():
    pairs = {
        "far": verdict(5, ABOVE),
        "near": verdict(0.1, ACROSS),
        "nearer": verdict(0.05, ACROSS),
    }
    assert every(pairs).verdict == UNDECIDED and every(pairs).lead == 0.05
    assert every(pairs).why == "nearer: the interval contains 0"
    assert some(pairs).verdict == HOLDS and some(pairs).why == "far"
    pairs["behind"] = verdict(-2, BELOW)
    assert every(pairs).verdict == FAILS and some({"behind": pairs["behind"]}).verdict == FAILS
    unknown = {"far": pairs["far"], "missing": verdict(untestable="not trained")}
    assert every(unknown).verdict == UNTESTABLE and some(unknown).verdict == HOLDS


def answers(rates, count=200):
    rows = [(t, i < r * count) for t, r in zip(TASKS, rates, strict=False) for i in range(count)]
    return pd.DataFrame(rows, columns=["task", "correct"])


def test_bootstrap_is_centred_paired_and_as_wide_as_theory():
    table = answers([0.5] * 5)
    samples = bootstrap(table, resamples=2000)
    assert samples.shape == (2000, 6)
    assert np.array_equal(samples, bootstrap(table, resamples=2000))
    assert samples[:, -1].mean() == pytest.approx(50, abs=0.3)
    assert samples[:, 0].std() == pytest.approx(100 * (0.25 / 200) ** 0.5, rel=0.1)
    low, high = interval(samples[:, -1])
    assert low < 50 < high
    assert np.allclose(samples[:, -1], samples[:, :5].mean(1))


def test_questions_about_one_picture_are_drawn_together():
    single = answers([0.3, 0.8], count=60)
    single["hash"] = [f"{n:x}" for n in range(len(single))]
    twice = pd.concat([single, single], ignore_index=True)
    assert np.array_equal(bootstrap(single), bootstrap(single.drop(columns="hash")))
    assert np.array_equal(bootstrap(twice), bootstrap(single))
    assert bootstrap(twice.drop(columns="hash"))[:, -1].std() < 0.8 * bootstrap(twice)[:, -1].std()
    uneven = pd.DataFrame({"task": "VQA", "correct": [1, 1, 1, 0], "hash": list("aaab")})
    assert set(bootstrap(uneven)[:, 0]) == {0, 75, 100}  # b twice, both, a twice


def test_scores_compare_models_over_questions_and_seeds():
    seeds = pd.DataFrame(
        {"VQA": [80.0, 50, 60, 70, 50, 60], "Geometry": [50.0, 50, 90, 60, 50, 90]},
        index=pd.MultiIndex.from_product(
            [[1, 2], ["good", "bad", "second"]], names=["seed", "model"]
        ),
    )
    seeds["Avg"] = seeds.mean(axis=1)
    everyone = {
        "good": answers([0.8, 0.5], 400),
        "bad": answers([0.5, 0.5], 400),
        "second": answers([0.6, 0.9], 400),
    }
    scores = Scores(everyone, seeds)
    found = scores.beats("good", "bad")
    assert found.verdict == HOLDS and found.lead == pytest.approx(15)
    assert (found.lowest_seed, found.highest_seed) == (15, 15)
    assert found.low < 15 < found.high < 20
    assert scores.beats("bad", "good").verdict == FAILS
    assert scores.beats("good", "bad", "Geometry").verdict == UNDECIDED  # the same answers
    mean = scores.beats("good", ["bad", "second"])
    assert mean.lead == pytest.approx(65 - (50 + 75) / 2)
    assert mean.verdict == HOLDS and mean.lowest_seed == pytest.approx(65 - 62.5)
    assert Scores(everyone).beats("good", "bad").verdict == HOLDS  # of this run alone
    assert scores.beats("good", "bad", untestable="why").verdict == UNTESTABLE
    with pytest.raises(KeyError, match="ugly"):
        scores.beats("good", "ugly")


def test_pairing_tells_apart_what_two_separate_intervals_do_not():
    rng = np.random.default_rng(0)
    first = pd.DataFrame({"task": "VQA", "correct": rng.random(1000) < 0.5})
    second = first.assign(correct=first["correct"] | (rng.random(1000) < 0.02))
    scores = Scores({"first": first, "second": second})
    apart = [np.quantile(scores.samples[m]["Avg"], [0.025, 0.975]) for m in ("first", "second")]
    assert apart[0][1] > apart[1][0]  # they overlap
    assert scores.beats("second", "first").verdict == HOLDS


def test_a_table_and_sentences_say_what_was_found():
    found = {"a beats b": verdict(2, ABOVE, [1]), "b beats a": verdict(-2, BELOW, [-1])}
    table = verdict_table(found | {"a beats c": verdict(untestable="no c")})
    assert list(table["verdict"]) == [HOLDS, FAILS, UNTESTABLE] and table.index.name == "claim"
    assert {"lead", "low", "high", "lowest seed", "highest seed", "why"} < set(table.columns)
    assert sentences(found) == "Holds: a beats b.\nDoes not hold: b beats a."


def test_average_ranks_share_what_is_equal():
    scores = pd.DataFrame({"a": [3.0, 1.0], "b": [2.0, 1.0], "c": [1.0, 5.0]})
    assert average_ranks(scores).to_dict() == {"a": 1.75, "b": 2.25, "c": 2.0}


def test_critical_difference_is_the_published_one():
    """Demšar (2006): four classifiers on 14 data sets, q 2.569 and a difference of 1.25."""
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)
    assert critical_difference(2, 10) == pytest.approx(1.960 * (2 * 3 / 60) ** 0.5, abs=1e-3)
