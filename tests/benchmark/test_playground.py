"""What the sliders show: stored grids, and answers that are the shipped study's own."""

import io
import re
from base64 import b64decode
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.io import wavfile

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

from optmerge_core import load_recipe  # noqa: E402
from optmerge_core.benchmark import playground  # noqa: E402
from optmerge_core.benchmark.evaluator import evaluator_for  # noqa: E402
from optmerge_core.evaluation.metrics import accuracy  # noqa: E402
from optmerge_core.evaluation.questions import load_split  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "figures" / "internvl"


@pytest.fixture(scope="module")
def bench():
    return playground.Bench(load_recipe(ROOT / "data" / "recipes" / "internvl.yaml"))


def test_a_grid_by_hand(tmp_path):
    (tmp_path / "figxx_scaling.csv").write_text(
        "method,scaling_coefficient,accuracy\nties,0.5,40\nties,1,50\noptmerge,1,60\n"
    )
    (tmp_path / "tablexx_methods.csv").write_text("method,norm\nOptMerge,4\nTIES Merging,2\n")
    grid = playground.Grid(tmp_path)
    assert grid.scalings == [1.0] and grid.norm == {"optmerge": 4, "ties": 2}
    left, right = grid.draw("ties", 1.0).axes
    assert left.get_title() == "TIES Merging at λ = 1: 50.0 %"
    assert [bar.get_width() for bar in right.patches] == [4, 2]
    plt.close("all")


@pytest.mark.slow
def test_two_random_points_of_the_grid_are_what_the_models_answer(bench):
    """Which two is drawn anew every time; a near tie may fall otherwise on another machine."""
    study, grid = bench.study, playground.Grid(FIGURES)
    size = study.recipe.evaluation
    asked = evaluator_for(size.references["mixture"], load_split(size.data, "validation", 200))
    rng = np.random.default_rng()
    for _ in range(2):
        method = rng.choice(list(grid.accuracy))
        scaling = rng.choice(grid.scalings)
        answers = asked.answer_merged(bench.base, bench.merged(method), scaling)
        found = grid.accuracy.loc[scaling, method]
        assert abs(accuracy(answers)["Avg"] - found) < 1, (method, scaling)


def test_answers_are_those_of_the_test(bench):
    saved = pd.read_parquet(FIGURES / "predictions.parquet")
    rows = saved[saved["task"] == "OCR"].groupby("model").nth(3).set_index("model")
    (_, base, right), (_, expert, _), (merged, _, _) = bench.ask("OCR", 3)
    assert base == rows.loc["Base model", "prediction"] and not right
    assert expert == rows.loc["Individual OCR", "prediction"]
    assert merged == "OptMerge, λ = 1"


def test_a_question_of_ones_own_is_neither_right_nor_wrong(bench):
    replies = bench.ask("VQA", 4, "how many squares ?", "task_arithmetic", 0.5, "OCR")
    assert [right for *_, right in replies] == [None] * 3
    assert replies[-1][0] == "Task Arithmetic, λ = 0.5, without OCR"
    assert all(said for _, said, _ in replies)
    figure = bench.draw("VQA", 4, replies, "how many squares ?")
    assert "answer" not in figure.axes[1].texts[0].get_text()
    plt.close("all")


def test_without_an_expert_its_task_vector_is_missing(bench):
    name = bench.names[0]
    whole, without = (bench.merged("task_arithmetic", x)[name] for x in (None, "OCR"))
    place = list(bench.study.experts).index("OCR")
    torch.testing.assert_close(whole - without, bench.study.task_vectors()[name][place])


def test_truncation_is_numpys(bench):
    vectors, kept = bench.truncated("Chart", 0.1)
    place, all_kept, total = list(bench.study.experts).index("Chart"), 0.0, 0.0
    for name in bench.names:
        tau = bench.study.task_vectors()[name][place].double().numpy()
        U, S, V = np.linalg.svd(tau, full_matrices=False)
        rank = max(1, round(0.1 * len(S)))
        np.testing.assert_allclose(vectors[name], (U[:, :rank] * S[:rank]) @ V[:rank], atol=1e-5)
        all_kept, total = all_kept + (S[:rank] ** 2).sum(), total + (S**2).sum()
    assert kept == pytest.approx(all_kept / total, rel=1e-4)
    assert bench.truncated("Chart", 1.0)[1] == pytest.approx(1)
    assert "100% of its directions" in bench.ask_truncated("Chart", 0, 1.0)[-1][0]


def test_a_sound_is_in_the_page():
    wave = np.sin(np.linspace(0, 100, 1600)).astype(np.float32)
    (data,) = re.findall(r'src="data:audio/wav;base64,([^"]+)"', playground.sound(wave, 16000))
    rate, heard = wavfile.read(io.BytesIO(b64decode(data)))
    assert rate == 16000
    np.testing.assert_allclose(heard / 32767, wave, atol=1e-4)


def test_a_moved_control_draws_anew():
    from ipywidgets import IntSlider

    seen = []

    def draw(number):
        seen.append(number)
        return plt.figure()

    slider = IntSlider(1, 0, 5)
    playground.board(draw, number=slider)
    slider.value = 4
    assert seen == [1, 4] and not plt.get_fignums()
