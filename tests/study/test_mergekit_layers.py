"""mergekit's numbers by layer and filter, its further methods and whole slices: its own values."""

import warnings

import pytest
import torch
import yaml
from mergekit_cases import case, digest, shapes, write_models
from mergekit_layers import (
    DENSITY,
    EPSILON,
    FILES,
    LAYERED,
    LAYERS,
    MODELS,
    ROWS,
    WIDTH,
    layered_files,
    sliced,
)
from safetensors import safe_open

from optmerge_core import load_recipe, merge, open_checkpoint
from optmerge_core.__main__ import main
from optmerge_core.methods.della import magprune
from optmerge_core.study.open import open_study, settings
from optmerge_core.study.recipe import RecipeError

ALL = layered_files()


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Number of layers -> folder of a tiny Llama and its experts, near and far ones too."""
    root = tmp_path_factory.mktemp("layers")
    for count in (1, LAYERS):
        write_models(root / str(count), ("float32",), count, MODELS)
    return {count: root / str(count) / "float32" for count in (1, LAYERS)}


@pytest.fixture(scope="module")
def golden():
    """Name of a file -> all entries of the model that mergekit made of it, float32."""
    with safe_open(LAYERED, "pt") as file:
        made_of = file.metadata()["files"]
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert made_of == digest([ALL, MODELS]), "run tests/make_mergekit_golden.py, which says how"
    return values


def entries(tensors):
    """In the order of the golden values."""
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    return torch.cat([tensors[name].float().flatten() for name in shapes(layers)])


def write(root, text):
    path = root / "mergekit.yaml"
    path.write_text(f"{text}\nscope: all\n")
    return path


def merged_here(path, output):
    recipe = load_recipe(path)
    with warnings.catch_warnings():  # a model between which and another a merge lies may be base
        warnings.simplefilter("ignore")
        merge(recipe.base_model, recipe.experts, output, **settings(recipe))
    return open_checkpoint(output)


@pytest.mark.parametrize("name", ALL)
def test_a_file_gives_what_mergekit_made_of_it(roots, golden, tmp_path, monkeypatch, name):
    """Every entry, to the rounding of float32 arithmetic."""
    layers, text = ALL[name]
    monkeypatch.chdir(roots[layers])
    ours = entries(merged_here(write(roots[layers], text), tmp_path / "out"))
    difference, theirs = (ours - golden[name]).abs(), golden[name]
    assert difference.max() <= 1e-6 * theirs.abs().max(), f"off by {difference.max():.1e}"


def test_the_command_parts_and_memory_give_the_same(roots, tmp_path, monkeypatch, capsys):
    root = roots[LAYERS]
    monkeypatch.chdir(root)
    path = write(root, ALL["ties, all"][1])
    expected = merged_here(path, tmp_path / "merged")
    assert main(["merge", str(path), "--output", str(tmp_path / "out"), "--no-check"]) == 0
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "parted")
    arguments = ["--output", out, "--plan", plan, "--max-part-size", "1KB"]
    assert main(["plan", str(path), *arguments]) == 0
    assert main(["part", plan, "1", "2"]) == 0 and main(["part", plan, "0", "2"]) == 0
    assert main(["join", plan]) == 0
    capsys.readouterr()
    in_memory = open_study(load_recipe(path)).merge_tensors()
    base = open_checkpoint(root / "base")
    for name, tensor in expected.items():
        for folder in ("out", "parted"):
            assert torch.equal(open_checkpoint(tmp_path / folder)[name], tensor)
        torch.testing.assert_close(base[name] + in_memory[name], tensor)
    # The model card's recipe makes the same model again.
    card = (tmp_path / "parted" / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    again = load_recipe(write(tmp_path, card.replace("scope: all\n", "")))
    assert again.options() == load_recipe(path).options() and "lambda" in again.options()


def test_della_keeps_by_rank_as_mergekit_does(golden):
    """Of rows with the same order of magnitudes, how often each rank stays; five deviations."""
    sizes = torch.arange(1.0, WIDTH + 1).expand(ROWS, WIDTH)[None]
    generator = torch.Generator().manual_seed(0)
    kept = magprune(sizes, DENSITY, EPSILON, rescale=False, generator=generator) != 0
    expected = torch.linspace(DENSITY - EPSILON, DENSITY + EPSILON, WIDTH)
    deviation = (expected * (1 - expected) / ROWS).sqrt()
    for counts in (kept[0].sum(dim=0), golden["kept by della"]):
        assert ((counts / ROWS - expected).abs() < 5 * deviation).all()


@pytest.fixture
def load(roots, monkeypatch):
    """A function that writes a file over the models of three layers, with changes, and loads it."""
    monkeypatch.chdir(roots[LAYERS])
    return lambda content: load_recipe(write(roots[LAYERS], yaml.safe_dump(content)))


def test_what_stands_beside_a_model_counts_before_what_stands_for_all(load):
    mlp = {"filter": "mlp", "value": [0, 1]}
    recipe = load(case("ties", (mlp, [mlp, {"filter": "*", "value": 2}], 3), base=True, weight=4,
                       density=[{"filter": "norm", "value": 0.5}]))  # fmt: skip
    assert recipe.options() == {
        "rule": "mergekit",
        "weights": [[mlp, {"value": 4}], [mlp, {"value": 2}], 3],
        "density": [{"filter": "norm", "value": 0.5}, {"value": 1.0}],
    }
    by_default = load(case("dare_ties", base=True, normalize=[{"filter": "mlp", "value": True}]))
    flags = [{"filter": "mlp", "value": True}, {"value": False}]
    assert by_default.options()["normalize"] == flags  # mergekit's default, not the paper's
    scaled = load(case("optmerge", base=True, rank_ratio=[0.1, 0.5], **{"lambda": [mlp]}))
    lambdas = {"lambda": [mlp, {"value": 1.0}]}
    assert scaled.options() == {"rank_ratio": [{"value": [0.1, 0.5]}]} | lambdas
    assert scaled.options("tsv") == lambdas and scaled.scaling_coefficient == 1.0
    assert load(case("tsv", base=True, **{"lambda": {"value": 0.5}})).scaling_coefficient == 0.5


def test_a_recipe_means_mergekits_sce_unless_it_says_the_papers(load):
    assert load(FILES["sce"]).options() == {"rule": "mergekit"}
    assert load(FILES["sce"]).options("model_stock") == {}
    papers = FILES["sce"] | {"method_options": {"sce": {"rule": "paper"}}}
    assert load(papers).options() == {"rule": "paper"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (case("ties", ([0, "a"], 1, 1), base=True), "weight 'a': one finite number"),
        (case("ties", (1, 1, []), base=True), r"weight \[\]: give at least one value"),
        (case("ties", 3 * ({"filter": "mlp", "value": 1, "end": 2},), base=True), "weight: end is"),
        (case("ties", 3 * ([{"filter": "mlp"}],), base=True), "weight .*: filter and value are"),
        (case("ties", 3 * ([{"value": 1}, 2],), base=True), "weight 2: filter and value are"),
        (case("ties", base=True, weight=1, normalize=[True, 1]), "normalize 1: true or false"),
        (case("ties", base=True, weight=1, density=[0, 1]), "density is 0; it must lie"),
        (case("linear", (RISING := [0, 1], 1, 1), normalize=False), "normalize false .*differ by"),
        (case("linear", (RISING, 0, 0)), "add up to 0"),
        (case("della", base=True, weight=1, density=0.9, epsilon=[0.05, 0.1]), "epsilon is 0.1"),
        (case("breadcrumbs", base=True, weight=1, density=0.9, rescale=True), "rescale true of br"),
        (case("ties", base=True, weight=1, density=[0.1, 1]) | {"trim": "model"},
         "trim='model' takes one density for all experts, layers"),
        (sliced(LAYERS, 1), "slices: models cannot be cut"),
        (sliced() | {"models": ["far"]}, "slices: models cannot be cut"),
        (sliced() | {"slices": 2 * sliced()["slices"]}, "slices: models cannot be cut"),
        (sliced(2, t=0.5), r"slices: layer_range \[0, 2\] of models that have 3 layers"),
        (case("task_arithmetic", 3 * ([{"filter": "mlp", "value": 1}],), base=True),
         "lm_head.weight: weights: expert 1 of 3 has none for lm_head.weight; add one without"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_before_anything_is_written(
    load, tmp_path, content, text
):
    with pytest.raises((RecipeError, ValueError), match=text):
        recipe = load(content)
        merge(recipe.base_model, recipe.experts, tmp_path / "out", **settings(recipe))
    assert not list(tmp_path.iterdir())


def test_a_filter_that_no_name_has_is_told(load, tmp_path):
    recipe = load(case("ties", base=True, weight=1, density=[{"filter": "mpl", "value": 0.5}]))
    with pytest.warns(UserWarning, match="density: the filter 'mpl' is part of the name of nothi"):
        merge(recipe.base_model, recipe.experts, tmp_path / "out", **settings(recipe))
