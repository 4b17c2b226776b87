"""The stored grid is what merging gives, and controls redraw what they say."""

import io
import time
import wave
from base64 import b64decode

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from optmerge_core import load_recipe
from optmerge_core.benchmark import play
from optmerge_core.benchmark.ask import Asked, drawing
from optmerge_core.benchmark.experiments import play as stored
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.places import checkout
from optmerge_core.study.open import open_study

RECIPES = {n: checkout() / f"data/recipes/{n}.yaml" for n in ("internvl", "qwen2_vl")}


@pytest.fixture(scope="module")
def study():
    return load_recipe(RECIPES["internvl"])


def test_two_random_points_are_computed_again():
    scores, spectra = play.tables()
    for point in scores[scores["scaling_coefficient"] > 0].sample(2).to_dict("records"):
        recipe = load_recipe(RECIPES[point["study"]])
        opened, evaluator = open_study(recipe), stored.evaluator_of(recipe)
        ratio = point["rank_ratio"] and float(point["rank_ratio"])
        merged = stored.merged_task_vector(opened, point["method"], point["left_out"], ratio)
        found = stored.scores(evaluator, opened.base, merged, point["scaling_coefficient"])
        two_answers = 200 / stored.COUNT  # another CPU turns a near tie
        assert found[list(TASKS)].to_numpy() == pytest.approx(
            np.array([point[task] for task in TASKS]), abs=two_answers + 1e-9
        ), point
        same = (spectra[stored.MERGE] == pd.Series(point)[stored.MERGE]).all(axis=1)
        (row,) = spectra[same].drop(columns=stored.MERGE).to_dict("records")
        assert stored.spectrum(merged) == pytest.approx(row, rel=2e-3, abs=1e-4), point


def test_the_grid_is_whole_and_small():
    scores, spectra = play.tables()
    assert "internvl" in set(spectra["study"]) <= set(RECIPES)
    for name in spectra["study"].unique():
        path, keys = RECIPES[name], spectra[spectra["study"] == name][stored.MERGE[1:]]
        expected = [tuple(map(str, merge)) for merge in stored.merges(load_recipe(path).experts)]
        assert list(keys.itertuples(index=False, name=None)) == expected
    for _, rows in scores.groupby(stored.MERGE):
        plain = rows["left_out"].iloc[0] == rows["rank_ratio"].iloc[0] == ""
        assert tuple(rows["scaling_coefficient"]) == (stored.SCALING if plain else stored.FEW)
    average = scores[list(TASKS)].mean(axis=1)
    assert (scores["Avg"] - average).abs().max() < 0.06  # four digits are kept
    files = (checkout() / "data" / "benchmark").glob("play_*.csv")
    assert sum(file.stat().st_size for file in files) < 1e6


def test_a_spectrum_by_hand():
    import torch

    merged = {"a": torch.diag(torch.tensor([3.0, 1.0])), "b": torch.ones(4)}
    found = stored.spectrum(merged)
    assert found["norm"] == pytest.approx(14**0.5)  # of matrices and vectors
    # Rank 1 of 2 is at a share of 0.5, rank 2 at 1; left of the first it is the first's.
    assert (found["0.02"], found["1"]) == (3.0, 1.0)
    middle = min(found, key=lambda k: abs(float(k) - 0.75) if k != "norm" else 9)
    assert found[middle] == pytest.approx(3 - 2 * (float(middle) - 0.5) / 0.5, abs=1e-3)


def test_controls_redraw_in_under_half_a_second(study):
    for widget in (play.merges(study), play.left_out(study), play.rank_kept(study)):
        for control in widget.controls.values():
            before, options = widget.picture.value, list(control.options)
            taken = []
            for _, value in [*options[:2], *options[-2:]]:
                start = time.process_time()
                control.value = value
                taken += [time.process_time() - start] * (widget.picture.value != before)
            assert taken and min(taken) < 0.5  # other processes slow a run
        assert Image.open(io.BytesIO(widget.picture.value)).width > 400


def test_every_rank_ratio_is_there(study):
    widget = play.rank_kept(study)
    for _, ratio in widget.controls["ratio"].options:
        for scaling in stored.FEW[1:]:
            assert widget.draw(ratio, scaling).axes


def test_what_a_notebook_computed_is_drawn():
    lengths = play.length_of_sum(np.diag([4.0, 9.0]), ["a", "b"])
    picture = lengths.picture.value
    lengths.controls["experts"].value = []
    assert "choose one expert" in lengths.said.value and lengths.picture.value == picture
    lengths.controls["experts"].value = ["a"]
    assert lengths.said.value == "" and lengths.picture.value != picture
    rows = [(name, ratio, 50 + 40 * ratio) for name in ("a", "b") for ratio in (0.0, 0.5, 1.0)]
    kept = play.ranks(pd.DataFrame(rows, columns=["expert", "rank ratio", "accuracy"]))
    picture = kept.picture.value
    kept.controls["ratio"].value = 1.0
    assert kept.picture.value != picture


def test_a_study_without_a_grid_says_so():
    other = load_recipe(checkout() / "data/recipes/internvl_stressed.yaml")
    for control in (play.merges, play.left_out, play.rank_kept):
        assert "internvl_stressed: no stored merges" in control(other).data


def test_a_page_gets_a_picture_and_a_front_end_the_controls_too(study, monkeypatch):
    shown = []
    monkeypatch.setattr(play, "display", lambda bundle, raw: shown.append(bundle))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    widget = play.merges(study)
    widget._ipython_display_()
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook")
    widget._ipython_display_()
    assert shown[0].keys() == {"image/png", "text/plain"}
    assert b64decode(shown[0]["image/png"]) == widget.picture.value
    assert "application/vnd.jupyter.widget-view+json" in shown[1] and "image/png" in shown[1]


def test_a_player_holds_the_sound():
    text = play.player(np.array([0.0, 0.5, -1.0, 2.0]), 16000).data
    content = b64decode(text.split("base64,")[1].split('"')[0])
    with wave.open(io.BytesIO(content)) as file:
        samples = np.frombuffer(file.readframes(9), "<i2")
        assert file.getframerate() == 16000
    assert samples.tolist() == [0, 16383, -32767, 32767] and "<source" not in text


def test_a_drawing_by_hand():
    image = np.asarray(drawing("red square 8 10 20; text A 40 40"))
    assert image.shape == (56, 56, 3)
    assert image[20, 18].tolist() == [214, 48, 48] and image[5, 5].tolist() == [248] * 3
    assert image[40:, 40:].min() < 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red circle 8 8", "write COLOUR SHAPE"),
        ("pink circle 8 8 20", "colours: red"),
        ("red circle 8 8 90", "from 0 to 56"),
        ("red", "write COLOUR"),
    ],
)
def test_a_drawing_that_cannot_be_read_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        drawing(text)


def test_everyone_answers(study):
    asked = Asked(study)
    row = asked.row("OCR", 0)
    assert row["task"] == "OCR"
    found = asked.answers(row["image"], row["question"], row["answer"], "OCR")
    assert [r["who"] for r in found] == [
        "Base model", *(f"Expert {name}" for name in study.experts), "Merged model"
    ]  # fmt: skip
    (expert,) = (r for r in found if r["who"] == "Expert OCR")
    assert expert["answer"] == row["answer"] and expert["right"]
    image = drawing("red circle 14 14 12")
    start = time.process_time()
    found = asked.answers(image, "what color is the circle ?")
    assert time.process_time() - start < 0.5
    assert {r["who"]: r["answer"] for r in found}["Expert VQA"] == "red"
    with pytest.raises(ValueError, match="unknown words: colour"):
        asked.answers(image, "what colour is the circle ?")
