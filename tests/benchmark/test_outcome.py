"""What came out: sentences, orders and the paper's tables beside ours, from made-up tables."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from optmerge_core.benchmark import beside, outcome
from optmerge_core.benchmark.results import Results, by_chance, order, spearman

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "Base model": (30, 50), "Individual OCR": (90, 40), "Individual VQA": (20, 70),
    "Weight Average": (40, 50), "Task Arithmetic": (50, 50), "OptMerge": (60, 60),
    "Mixture Training": (80, 80),
}  # fmt: skip
"""Model -> how many of a hundred questions it is right about, in OCR and in VQA."""


@pytest.fixture
def results(tmp_path):
    """A study of two tasks, in a folder as the notebooks write it; no other training seeds."""
    answers = [
        {"task": task, "model": model, "correct": number < right, "hash": str(number)}
        for model, both in MODELS.items()
        for task, right in zip(("OCR", "VQA"), both, strict=True)
        for number in range(100)
    ]
    pd.DataFrame(answers).to_parquet(tmp_path / "predictions.parquet")
    scores = pd.DataFrame(MODELS, index=["OCR", "VQA"]).T.assign(Avg=lambda t: t.mean(axis=1))
    scores.rename_axis("method").to_csv(tmp_path / "table02_full_finetuning.csv")
    claims = {"lead": 2.0, "low": -0.04, "high": 4.0, "verdict": "undecided", "why": "tie"}
    table = pd.DataFrame({claim: claims for claim in outcome.LEADS}).T.rename_axis("claim")
    table.iloc[1, 3:] = "not testable here", "nothing moves"
    table.to_csv(tmp_path / "tablexx_claims.csv")
    (tmp_path / "tablexx_norm_matched.csv").write_text(
        "method,direction,length\nOptMerge,12,-0.02\n"
    )
    (tmp_path / "table07_cost.csv").write_text(
        "setting,seconds\nOptMerge,3\nmixture training,600\n"
    )
    recipe = SimpleNamespace(
        name="made", fine_tuning="full", base_model="nowhere/base",
        evaluation=SimpleNamespace(test_samples=100),
    )  # fmt: skip
    return Results(recipe, tmp_path)


def test_the_share_covered_by_hand(results):
    """Own level (90 + 70) / 2 = 80, base 40, OptMerge 60: half of the way."""
    share, low, high = results.covered()
    assert share == pytest.approx(50) and low < 50 < high
    assert results.covered("Weight Average")[0] == pytest.approx(12.5)
    assert (results.seeds, results.questions, results.label) == (1, 200, "made (full fine-tuning)")


def test_a_folder_without_scores_says_what_to_run(results, tmp_path):
    with pytest.raises(ValueError, match="no table of scores: run notebook 04 or 05"):
        _ = Results(results.recipe, tmp_path / "empty").stem


def test_spearman_is_scipys_ties_and_gaps_included():
    rng = np.random.default_rng(0)
    first, second = (pd.Series(rng.integers(5, size=12).astype(float)) for _ in range(2))
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    first[3] = np.nan
    assert spearman(first, second) == pytest.approx(
        spearmanr(first.drop(3), second.drop(3)).statistic
    )


def test_by_chance_is_the_exact_quantile_of_few_methods():
    """Of the 6 orders of three methods two have |ρ| = 1 and four 1/2."""
    assert by_chance(3, 0.5) == pytest.approx(0.5)
    assert by_chance(3, 0.9) == pytest.approx(1)
    assert by_chance(9) == pytest.approx(0.683, abs=0.02)  # by 200 000 draws of another generator


def test_the_order_against_a_paper(results):
    paper = pd.Series({"OptMerge": 3.0, "Task Arithmetic": 2.0, "Weight Average": 1.0, "TSV": 9})
    row = order(paper, results)
    assert (row["methods"], row["ρ"]) == (3, 1) and row["low"] <= row["high"] <= 1
    assert order(-paper, results)["ρ"] == -1
    assert "lowest seed" not in row


def test_the_sentences_are_the_tables(results, tmp_path):
    folder = tmp_path / "omni"
    folder.mkdir()
    (folder / "table05_modalities.csv").write_text(
        "model,color,one modality,Avg\nBase model,50,50,50\nOptMerge,70,70,70\nIso-C,80,80,80\n"
    )
    omni = Results(results.recipe, folder)
    paper = pd.Series({"OptMerge": 3.0, "Task Arithmetic": 2.0, "Weight Average": 1.0})
    table = outcome.ten_sentences([results], omni, {"made": paper})
    said = table["what came out"]
    assert len(table) == 10 and said.str.endswith(".").all()
    assert "OptMerge covers 50 % (" in said[0]
    assert "+2.0 points (0.0 to 4.0) on made (full fine-tuning): undecided (tie)." in said[1]
    assert said[2].endswith("on made (full fine-tuning): not testable here (nothing moves).")
    assert "ρ of +1.00 (" in said[6]
    assert "+12.0 points by its direction and 0.0 by its length" in said[7]
    assert "3.0 s (0.5 %) on made" in said[8]
    assert "the base model has 50.0 %, OptMerge 70.0 %; the best merge, Iso-C" in said[9]
    assert table["questions"].tolist() == [200] * 7 + [66, 0, 100]
    text = outcome.linked(table, ROOT / "notebooks", tmp_path, ROOT / "notebooks")
    assert text.startswith("1. Of the way") and text.count("\n") == 10
    assert "(05_evaluation.ipynb#4-·-Is-a-difference-a-difference?)" in text


def test_a_section_within_a_cell_and_an_appendix():
    found = [outcome.section(ROOT / "notebooks", *place) for place in (("04", 6), ("03", 7))]
    assert found == [
        "04_omni_composition.ipynb#6-·-Merged,-and-composed-online",
        "03_merging.ipynb#Appendix:-7-·-What-it-costs-(Table-7)",
    ]


def test_a_section_that_there_is_not():
    with pytest.raises(ValueError, match="05_evaluation.ipynb has no section 40"):
        outcome.section(ROOT / "notebooks", "05", 40)


def test_the_ranks_are_of_merges_that_both_have():
    paper = pd.Series({"Base model": 1.0, "TIES Merging": 5, "OptMerge": 7, "Iso-C": 9})
    here = pd.Series({"Base model": 2.0, "OptMerge": 8, "TIES Merging": 4, "SWUDI": 1})
    table = beside.ranked(paper, here)
    assert table.index.tolist() == ["Base model", "OptMerge", "TIES Merging"]
    assert table["rank, here"].tolist()[1:] == [1, 2] == table["rank, paper"].tolist()[1:]
    assert np.isnan(table.loc["Base model", "rank, here"])


def test_every_table_of_the_paper_has_its_counterpart(results):
    """Of the committed tables, by the numbers that are printed in both."""
    published = ROOT / "data" / "paper"
    shipped = Results(SimpleNamespace(name="internvl"), ROOT / "figures" / "internvl")
    assert beside.scores(published, shipped).loc["OptMerge", "paper"] == 57.44
    assert beside.training(published, [shipped]).loc["VQA"].tolist() == ["588K", 19200]
    assert beside.ablation(published, [shipped]).loc["+ SGD", "paper, modalities"] == 66.91
    costs = beside.cost(published, [shipped])
    assert costs["% of the time"].iloc[0] == pytest.approx(100 * 0.22 / 25.38)
    assert costs["hours"].iloc[-1] == shipped.table("table07_cost")["seconds"].iloc[-1] / 3600
    assert beside.rank_ratios(published, [shipped])["paper"].tolist() == pytest.approx(
        [-0.5, 0, -0.8, -3.21, -4.45]
    )
    larger = beside.scale(published, [results])
    assert larger.loc["made"].tolist() == [40, 65, 60, 20, -5]
    assert larger.loc["paper, 32B", "lead over the best expert"] == pytest.approx(72.52 - 71.87)
    ten = beside.two_abilities(published, [shipped])
    assert ten.loc["OptMerge", "paper"] == pytest.approx(70.336)
    makers = beside.makers(published, ROOT / "figures" / "comparison")
    assert makers.loc["OptMerge", "paper"] == 66.7
    omni = Results(SimpleNamespace(name="omni"), ROOT / "figures" / "omni")
    assert beside.modalities(published, omni).loc["Audio", "paper"] == 37.75


def test_a_study_without_a_table_of_the_paper_has_no_averages():
    assert beside.averages(ROOT / "data" / "paper", "table05_modalities") is None
