"""A sweep's points, its numbers against merges made one by one, and what an interruption leaves."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from optmerge_core import load_recipe, open_checkpoint
from optmerge_core.__main__ import main
from optmerge_core.merging.families import mergeable
from optmerge_core.merging.loop import merge_tensors
from optmerge_core.study.open import open_study
from optmerge_core.study.sweep import parse_axes, points, sweep

RECIPES = Path(__file__).resolve().parents[2] / "data" / "recipes"


@pytest.fixture
def recipe(tiny, tmp_path):
    """A function that writes a recipe of the tiny experts and returns its path."""

    def write(name="tiny", **changes):
        models = [{"model": str(folder), "name": name} for name, folder in tiny.experts.items()]
        content = {"merge_method": "ties", "base_model": str(tiny.base), "models": models}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


def test_axes():
    axes = parse_axes(
        ["method=ties, tsv", "lambda=0.3,1,1e-1,1.5e1", "rank_ratio=null,0.2", "x=true"]
    )
    assert axes == {
        "method": ["ties", "tsv"],
        "lambda": [0.3, 1, 0.1, 15.0],
        "rank_ratio": [None, 0.2],
        "x": [True],
    }
    assert parse_axes([]) == {}
    for text in ("method", "method=", "=ties", "lambda=1,,2", "density=[1"):
        with pytest.raises(ValueError, match="--sweep .*NAME=VALUE|not values YAML"):
            parse_axes([text])
    with pytest.raises(ValueError, match="--sweep lambda: given twice"):
        parse_axes(["lambda=1", "lambda=2"])
    with pytest.raises(ValueError, match="--sweep 'lambda=1,010': line 1: 010 is a number in base"):
        parse_axes(["lambda=1,010"])
    assert parse_axes(["lambda=-.5,1_0"]) == {"lambda": [-0.5, 10]}


def test_the_product_over_recipes_with_each_recipes_own_where_no_axis_is(recipe):
    first = recipe(parameters={"lambda": 0.5, "density": 0.4})
    second = recipe("other", merge_method="tsv", method_options={"ties": {"density": 0.3}})
    found = [point.key[:4] for point in points([first, second], {})]
    assert found == [("tiny", "ties", "density=0.4", 0.5), ("other", "tsv", "", 1.0)]
    axes = {"density": [0.1, 0.2], "method": ["ties"], "lambda": [1, 2]}
    assert [point.key[:4] for point in points([first, second], axes)] == [
        (name, "ties", f"density={density}", scaling)
        for name in ("tiny", "other")
        for density in (0.1, 0.2)
        for scaling in (1.0, 2.0)
    ]
    assert len(points([first], {"lambda": [1, 1.0]})) == 1


def test_what_follows_a_method_is_an_axis(recipe):
    found = points([recipe(then="svc")], {"then": ["svc", None], "method": ["tsv"]})
    assert [point.options for point in found] == [{"then": "svc"}, {"then": None}]
    assert points([recipe(then="svc")], {"method": ["tsv"]})[0].options == {"then": "svc"}


def test_what_a_method_does_not_have_is_left_out_with_a_notice(recipe):
    axes = {"method": ["ties", "optmerge", "linear"], "rank_ratio": [0.2]}
    with pytest.warns(UserWarning, match="ties has no rank_ratio; weight_average has no rank_rat"):
        found = points([recipe()], axes)
    assert [point.method for point in found] == ["optmerge"]
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="no point is left"),
    ):
        points([recipe()], {"density": [0.1], "method": ["tsv"]})


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ({"method": ["karcher"]}, "no merge method 'karcher'"),
        ({"method": ["slerp"]}, "slerp merges the base model and one expert; 3 experts"),
        ({"ranks": [1]}, "--sweep ranks: no method has this option; .*rank_ratio"),
        ({"generator": [1]}, "--sweep generator: no method has this option"),
        ({"density": [0.1, 2]}, "density is 2"),
        ({"lambda": [".nan"]}, "lambda '.nan': one finite number"),
        ({"learning_rate": ["fast"], "method": ["wudi"]}, "learning_rate|wrong type"),
    ],
)
def test_unknown_names_and_values_are_errors_before_any_work(recipe, tmp_path, axes, text):
    with pytest.raises(ValueError, match=text):
        sweep([recipe()], axes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_recipes_of_one_name(recipe):
    with pytest.raises(ValueError, match="the name 'tiny' is .*tiny.yaml's too"):
        points([recipe(), recipe()], {})


def test_data_free_quantities_are_those_of_the_scaled_merge(recipe, tiny, tmp_path):
    """Loss and norm from their definitions, for every scaling coefficient."""
    axes = {"method": ["task_arithmetic", "ties"], "lambda": [0, 0.3, 1.5]}
    table = sweep([recipe()], axes, tmp_path / "out", "cpu")
    assert list(table.columns) == [
        "recipe", "method", "options", "scaling_coefficient",
        "interference_loss", "norm", "seconds",
    ]  # fmt: skip
    base = open_checkpoint(tiny.base)
    experts = {name: open_checkpoint(folder) for name, folder in tiny.experts.items()}
    names = mergeable(base.shapes(), "internvl")
    for row in table.itertuples():
        merged = merge_tensors(base, experts, names, method=row.method)
        loss = square = 0.0
        for name in names:
            tau = row.scaling_coefficient * merged[name].double()
            square += tau.square().sum().item()
            for expert in experts.values():
                own = expert[name].double() - base[name].double()
                loss += ((tau - own) @ own.T).square().sum().item() / own.square().sum().item()
        assert row.interference_loss == pytest.approx(loss, rel=1e-4)
        assert row.norm == pytest.approx(square**0.5, rel=1e-5, abs=1e-12)
        assert row.seconds > 0


class Scores:
    """Made-up accuracies, the points they were asked for, and an interruption after `limit`."""

    def __init__(self, limit=100):
        self.asked, self.limit = [], limit

    def __call__(self, recipe):
        def score(base, merged, scaling_coefficient):
            if len(self.asked) == self.limit:
                raise KeyboardInterrupt
            self.asked.append((recipe.name, scaling_coefficient))
            assert all(tensor.shape == base[name].shape for name, tensor in merged.items())
            return {"Chart": 10 * scaling_coefficient, "Avg": 1.0 / 3}

        return score


def test_lambdas_by_layer_are_in_the_merged_and_times_those_of_the_sweep(recipe, tmp_path):
    path = recipe(parameters={"density": 0.4, "lambda": [0.5, 1.5]})
    table = sweep([path], {"lambda": [1, 2]}, tmp_path / "sweep")
    merged = open_study(load_recipe(path)).merge_tensors()
    norm = sum(tensor.double().square().sum().item() for tensor in merged.values()) ** 0.5
    assert table["norm"].tolist() == pytest.approx([norm, 2 * norm])
    assert table["options"].unique().tolist() == ["density=0.4, lambda=[{'value': [0.5, 1.5]}]"]


def test_finished_points_are_kept_and_not_computed_again(recipe, tmp_path):
    out, paths = tmp_path / "out", [recipe(), recipe("other")]
    axes = {"lambda": [0.1, 0.3, 0.7]}
    scores = Scores(limit=4)
    with pytest.raises(KeyboardInterrupt):
        sweep(paths, axes, out, "cpu", scores)
    kept = pd.read_csv(out / "figures" / "tablexx_sweep.csv")
    assert len(kept) == 4 and not list(out.rglob("*.partial"))

    scores = Scores()
    table = sweep(paths, axes, out, "cpu", scores)
    assert scores.asked == [("other", 0.3), ("other", 0.7)]
    assert list(table["recipe"]) == ["tiny"] * 3 + ["other"] * 3
    assert table["Chart"].tolist() == pytest.approx([1, 3, 7] * 2)
    assert table["Avg"].tolist() == [1 / 3] * 6
    assert table.columns.tolist()[4:6] == ["Chart", "Avg"]

    # Further points are added; the table is that of this sweep, the file has all.
    scores = Scores()
    table = sweep(paths[:1], {"lambda": [0.7, 1]}, out, "cpu", scores)
    assert scores.asked == [("tiny", 1.0)] and table["scaling_coefficient"].tolist() == [0.7, 1]
    assert len(pd.read_csv(out / "figures" / "tablexx_sweep.csv")) == 7

    # What else the recipe says has changed: its points are computed again, the other's are kept.
    recipe(seed=3)
    scores = Scores()
    sweep(paths, axes, out, "cpu", scores)
    assert scores.asked == [("tiny", 0.1), ("tiny", 0.3), ("tiny", 0.7)]
    assert len(pd.read_csv(out / "figures" / "tablexx_sweep.csv")) == 6
    page = (out / "index.html").read_text()
    assert "<h1>out</h1>" in page and "merge_method: ties" in page and "<h2>Notebooks" not in page


def test_a_file_of_another_kind_is_refused(recipe, tmp_path):
    (tmp_path / "out" / "figures").mkdir(parents=True)
    (tmp_path / "out" / "figures" / "tablexx_sweep.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="tablexx_sweep.csv: not the table of a sweep"):
        sweep([recipe()], {}, tmp_path / "out")


def test_modalities_are_swept_too(family, tmp_path):
    models = [{"model": str(folder), "name": name} for name, folder in family.folders.items()]
    content = {"merges": "modalities", "base_model": str(family.base), "models": models}
    (tmp_path / "omni.yaml").write_text(yaml.safe_dump(content))
    axes = {"method": ["weight_average", "task_arithmetic"], "lambda": [1]}
    table = sweep([tmp_path / "omni.yaml"], axes, tmp_path, "cpu")
    mean, total = table["norm"]
    assert mean > 0 and total == pytest.approx(len(models) * mean, rel=1e-5)


def test_command_on_embedded_models_with_two_questions_a_task(tmp_path, capsys):
    """Accuracies equal the evaluator's own; λ = 0 is the base model."""
    from optmerge_core.benchmark.evaluator import evaluator_for
    from optmerge_core.evaluation.metrics import accuracy
    from optmerge_core.evaluation.questions import load_split

    study = load_recipe(RECIPES / "internvl.yaml")
    content = {
        "base_model": study.base_model,
        "models": [{"name": n, "model": m} for n, m in list(study.experts.items())[:2]],
        "evaluation": {"data": study.evaluation.data, "validation_samples": 2},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    out = str(tmp_path / "out")
    command = ["run", str(path), "--output", out, "--device", "cpu"]
    assert main([*command, "--sweep", "method=task_arithmetic", "lambda=0,1"]) == 0
    shown = capsys.readouterr()
    assert all(
        text in shown.out for text in ("small", "task_arithmetic", "Geometry", "interference loss")
    )
    table = pd.read_csv(tmp_path / "out" / "figures" / "tablexx_sweep.csv")
    evaluator = evaluator_for(study.base_model, load_split(study.evaluation.data, "validation", 2))
    base = open_checkpoint(study.base_model)
    own = [open_checkpoint(content["models"][i]["model"]) for i in range(2)]
    names = mergeable(base.shapes(), "internvl")
    merged = {n: sum(e[n].float() for e in own) - 2 * base[n].float() for n in names}
    for row, answers in enumerate((evaluator.answer(), evaluator.answer_merged(base, merged, 1.0))):
        expected = accuracy(answers)
        assert table.loc[row, list(expected.index)].tolist() == pytest.approx(expected.tolist())

    assert main(["run", str(path), "--sweep"]) == 1
    assert "error: --sweep: give --output DIR" in capsys.readouterr().err
    assert main([*command, "--sweep", "ranks=1"]) == 1
    assert "error: --sweep ranks: no method has this option" in capsys.readouterr().err
