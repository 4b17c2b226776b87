import os
import shutil
from pathlib import Path

import pytest
import yaml

from optmerge_core.merging.checks import check_method
from optmerge_core.methods import EXPERTS
from optmerge_core.methods.registry import METHODS
from optmerge_core.study.recipe import RecipeError, load_recipe


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a recipe over folders that exist, and returns its path."""
    for folder in ("study/base", "study/experts/ocr", "study/experts/vqa", "elsewhere/ocr"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")

    def write(**changes):
        content = {
            "merge_method": "ties",
            "base_model": "base",
            "models": [{"model": "experts/ocr"}, {"model": "experts/vqa"}],
        } | changes
        path = tmp_path / "study" / "tiny.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return write


def test_defaults_names_and_locations(write):
    recipe = load_recipe(write())
    assert recipe.name == "tiny" and recipe.seed == 0 and recipe.dtype is None
    assert recipe.scaling_coefficients == [0.1, 0.3, 0.5, 0.7, 1.0, 1.5]
    assert recipe.scaling_coefficient == 1.0 and recipe.options() == {}
    assert recipe.base_model == os.path.join("..", "study", "base")
    assert list(recipe.experts) == ["ocr", "vqa"]
    assert Path(recipe.experts["vqa"]).is_dir()


def test_locations_beside_the_recipe_then_here_then_on_the_hub(write):
    models = [{"model": "ocr", "name": "here"}, {"model": "owner/Expert-1.5", "name": "hub"}]
    evaluation = {"data": "experts", "references": {"mixture": "base"}, "test_samples": 20}
    recipe = load_recipe(write(models=models, evaluation=evaluation))
    assert recipe.experts == {"here": "ocr", "hub": "owner/Expert-1.5"}
    assert recipe.evaluation.data == os.path.join("..", "study", "experts")
    assert recipe.evaluation.references == {"mixture": recipe.base_model}
    assert recipe.evaluation.test_samples == 20


@pytest.mark.parametrize("text", ["1e-5", "1.5e3", "-2.E+1", ".5e0"])
def test_a_number_without_dot_or_sign_in_its_exponent_is_one(write, text):
    path = write(merge_method="wudi", method_options={"wudi": {"learning_rate": "LATER"}})
    path.write_text(path.read_text().replace("LATER", text))
    if float(text) >= 0:
        assert load_recipe(path).options() == {"learning_rate": float(text)}
    else:
        with pytest.raises(RecipeError, match=r"learning_rate -20\.0"):
            load_recipe(path)


@pytest.mark.parametrize(
    ("merge_method", "parameters", "method", "options"),
    [
        ("linear", {"weight": 0.5}, "weight_average", {}),
        ("task_arithmetic", {"weight": 1.0, "lambda": 0.4}, "task_arithmetic", {}),
        ("ties", {"density": 0.5}, "ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.75}, "dare_task_arithmetic", {"drop_rate": 0.25}),
        ("dare_ties", {"density": 0.75}, "dare_ties", {"drop_rate": 0.25, "density": 1.0}),
        ("optmerge", {"preset": "lora", "steps": 10}, "optmerge", {"preset": "lora", "steps": 10}),
        ("wudi", {"learning_rate": "1e-4"}, "wudi", {"learning_rate": 1e-4}),
    ],
)
def test_mergekits_words(write, merge_method, parameters, method, options):
    recipe = load_recipe(write(merge_method=merge_method, parameters=parameters))
    assert recipe.merge_method == method and recipe.options() == options
    assert recipe.scaling_coefficient == parameters.get("lambda", 1.0)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("ties", {"density": 0.2}),
        ("dare_ties", {"drop_rate": 0.2, "density": 0.2}),
        ("dare_task_arithmetic", {"drop_rate": 0.2}),
        ("optmerge", {"preset": "lora", "steps": 10}),
    ],
)
def test_a_weight_or_an_option_leaves_the_methods_other_options(write, method, own):
    other = {"momentum": 0.5} if method == "optmerge" else {"normalize": True}
    for parameters in ({"weight": 1}, other, {"lambda": 0.5}):
        changes = {"parameters": parameters, "method_options": {method: own}}
        options = load_recipe(write(merge_method=method, **changes)).options()
        assert own.items() <= options.items()


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", ".hidden", "a\nb", "a\x00", ""])
def test_a_name_is_that_of_a_folder(write, name):
    assert load_recipe(write(name="two words")).name == "two words"
    with pytest.raises(RecipeError, match="name: .* is to be a folder's name"):
        load_recipe(write(name=name))


@pytest.mark.parametrize("model", ["nowhere", "nowhere+ocr"])
def test_what_may_stand_for_a_model_names_an_adapter_only_where_one_is_meant(write, model):
    with pytest.raises(RecipeError, match="neither a folder .* nor a hub id") as caught:
        load_recipe(write(models=[{"model": model}]))
    assert ("nor base_model+adapter" in str(caught.value)) == ("+" in model)


def test_a_folder_that_is_built_says_by_which_command(write, tmp_path):
    log = tmp_path / "study" / "absent.json"
    log.write_text('{"steps": 7, "build": "make it", "loss": 0.5}')
    with pytest.raises(RecipeError, match="base_model: 'absent' is built, not shipped: make it$"):
        load_recipe(write(base_model="absent"))
    log.write_text('{"steps": 7}')
    with pytest.raises(RecipeError, match="base_model: 'absent' is neither a folder"):
        load_recipe(write(base_model="absent"))


def test_mergekits_parameters_beside_each_model_and_base_in_the_list(write):
    models = [{"model": "base"}]
    models += [{"model": f"experts/{x}", "parameters": {"density": 0.5}} for x in ("ocr", "vqa")]
    recipe = load_recipe(write(models=models))
    assert list(recipe.experts) == ["ocr", "vqa"] and recipe.options() == {"density": 0.5}
    recipe = load_recipe(write(models=[{"model": "base"}, {"model": "ocr"}], merge_method="linear"))
    assert list(recipe.experts) == ["base", "ocr"]  # in a mean, the base counts as it is listed


def test_options_for_studies_that_run_all_methods(write):
    method_options = {
        "ties": {"density": 0.4},
        "optmerge": {"preset": "lora", "learning_rate": 0.1},
    }
    recipe = load_recipe(write(method_options=method_options, parameters={"lambda": 0.5}))
    assert recipe.options("ties") == recipe.options() == {"density": 0.4}
    assert recipe.options("optmerge") == method_options["optmerge"]
    assert recipe.options("tsv") == {} and recipe.options("linear") == {}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"slices": []}, "slices: models cannot be cut"),
        ({"layers": []}, "layers: unknown key; valid are merge_method, base_model, models"),
        ({"models": [{"model": "base", "path": "x"}]}, "models.0.path: unknown key; valid are"),
        ({"evaluation": {"tests": 1}}, "evaluation.tests: unknown key; valid are data, contrast"),
        ({"base_model": None}, "base_model: Field required"),
        ({"base_model": 3}, "base_model: .*string"),
        ({"base_model": "../folder"}, "base_model: '../folder' is neither"),
        ({"base_model": "no/such/folder"}, "base_model: 'no/such/folder' is neither"),
        ({"models": [{"model": "nothing"}]}, "models.0.model: 'nothing' is neither"),
        ({"evaluation": {"data": "nothing"}}, "evaluation.data: 'nothing' is neither"),
        ({"models": []}, "models: .*at least 1"),
        ({"models": [{"model": "base"}]}, "only the base model"),
        ({"models": [{"model": "ocr"}, {"model": "experts/ocr"}]}, "names are not unique"),
        ({"merge_method": "passthrough"}, "passthrough.*weight_average"),
        ({"parameters": {"sparsity": True}}, "sparsity.*density"),
        ({"parameters": {"density": 7}}, "density"),
        ({"merge_method": "tsv", "parameters": {"weight": 0.5}}, "weight of tsv: only 1"),
        ({"parameters": {"lambda": [0, "x"]}}, "lambda 'x': one finite number"),
        ({"parameters": {"lambda": []}}, r"lambda \[\]: give at least one value"),
        ({"parameters": {"density": [0, 1]}}, "density is 0; it must lie"),
        ({"models": [{"model": "ocr", "parameters": {"t": 1}}]}, "'t' beside a model: only weight"),
        (
            {"models": [{"model": "ocr", "parameters": {"density": 1}}, {"model": "experts/vqa"}]},
            r"density \[1, None\]: some experts have none",
        ),
        (
            {"merge_method": "dare_ties", "parameters": {"density": 0.5, "drop_rate": 0.1}},
            "together under method_options.dare_ties",
        ),
        ({"method_options": {"ties": {"k": 1}}}, "k.*density"),
        ({"then": "svd"}, r"then 'svd': write svc, or \{svc: \{alpha: 0.5\}\}"),
        ({"then": {"svc": {"alpha": 0}}}, "alpha is 0; it must be a positive number"),
        ({"method_options": {"tiess": {}}}, "tiess"),
        ({"dtype": "int4"}, "dtype: .*bfloat16"),
        ({"family": "unheard"}, "family: .*internvl"),
        ({"seed": "many"}, "seed: .*integer"),
        ({"scaling_coefficients": [".nan"]}, "scaling_coefficients.0"),
    ],
)  # fmt: skip
def test_errors_name_the_recipe_and_the_key(write, changes, text):
    path = write(**changes)
    with pytest.raises(RecipeError, match=text) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_locations_with_a_revision_and_on_the_web(write):
    models = [
        "owner/expert@main",
        {"model": "owner/other@refs/pr/1"},
        {"model": "https://example.org/models/third"},
    ]
    recipe = load_recipe(write(models=models, base_model="owner/base@v1.0"))
    assert recipe.base_model == "owner/base@v1.0"
    assert recipe.experts == {
        "expert": "owner/expert@main",
        "other": "owner/other@refs/pr/1",
        "third": "https://example.org/models/third",
    }
    for wrong in ("owner/expert@", "owner@main", "ftp://example.org/x", "a/b@c d", "https:// x"):
        with pytest.raises(RecipeError, match=r"models.0.model: .* \(owner/name or owner/name@rev"):
            load_recipe(write(models=[wrong]))


def test_scope_router_and_remote_code(write):
    recipe = load_recipe(write())
    assert recipe.scope == "linear" and recipe.trust_remote_code is False
    assert recipe.router == "merge"
    recipe = load_recipe(write(scope="all", router="base", trust_remote_code=True))
    assert recipe.scope == "all" and recipe.trust_remote_code is True
    assert recipe.router == "base"
    assert load_recipe(write(scope="speech")).scope == "speech"
    with pytest.raises(RecipeError, match="router: .*'merge' or 'base'"):
        load_recipe(write(router="mean"))
    with pytest.raises(RecipeError, match="scope: .*'linear', 'speech' or 'all'"):
        load_recipe(write(scope="vision"))


SHIPPED = sorted((Path(__file__).resolve().parents[2] / "data" / "recipes").glob("*.yaml"))
TO_FILL = {  # what the paper names without an owner, or not at all
    "paper_table06_different_makers": ["Qwen2-VL-7B-GRPO-8k", "Qwen2-VL-7B-Pokemon"],
    "paper_table09_qwen2_5_vl_32b": [
        f"Qwen2.5-VL-32B-{task}" for task in ("OCR", "VQA", "Geometry", "Chart", "Grounding")
    ],
}
TO_TRAIN = {  # beside the recipe's folder, until it ships
    "smol_omni": ["language_model", "questions"]
    + [f"seed1/{place}{m}" for place in ("", "decoupled/") for m in ("vision", "speech")]
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_every_method_takes_its_options(path, tmp_path, monkeypatch):
    folders = [f"models/{folder}" for folder in TO_FILL.get(path.stem, [])]
    folders += [f"benchmark/{path.stem}/{folder}" for folder in TO_TRAIN.get(path.stem, [])]
    if folders:
        with pytest.raises(RecipeError, match=f"'../{folders[0]}' is neither a folder"):
            load_recipe(path)
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True)
        (tmp_path / "recipes").mkdir()
        path = shutil.copy(path, tmp_path / "recipes")
    recipe = load_recipe(path)
    for method in METHODS:
        if EXPERTS.get(method, len(recipe.experts)) == len(recipe.experts):
            check_method(method, recipe.options(method), len(recipe.experts))
    if recipe.name.startswith("paper_"):
        assert recipe.scaling_coefficients == [0.1, 0.3, 0.5, 0.7, 1.0, 1.5]
        assert recipe.options("optmerge")["preset"] in ("full", "lora", "modality")
        assert recipe.options("ties") == {"density": 0.2}
        assert recipe.options("dare_task_arithmetic") == {"drop_rate": 0.2}
        assert recipe.options("wudi") == {"learning_rate": 1e-5, "steps": 300}


def test_the_papers_studies_are_there():
    tables = {path.stem[6:13] for path in SHIPPED if path.stem.startswith("paper_")}
    assert tables == {"table02", "table03", "table05", "table06", "table09"}


@pytest.mark.parametrize(
    "content", ["- a", "a: [", "", "\x00", "!!python/object/apply:os.getcwd []"]
)
def test_files_that_are_no_recipe(tmp_path, content):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(RecipeError, match="bad.yaml"):
        load_recipe(tmp_path / "bad.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "missing.yaml")


# What YAML makes of a text, and what the text says


def text_of(path, line):
    """The recipe with one more line in its parameters."""
    path.write_text(path.read_text() + f"parameters:\n  {line}\n")
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5), (".5", 0.5), ("-.5", -0.5), ("+.5", 0.5), ("5e-1", 0.5), ("5E-1", 0.5),
        ("1e-3", 0.001), ("1.0e+3", 1000), ("1.e3", 1000), ("1_000", 1000), ("1_000.5", 1000.5),
        ("1_0e2", 1000), ('"0.3"', 0.3), ("'2'", 2), ("0x10", 16), ("01.5", 1.5), ("+1", 1),
        ("2.", 2), ("-0", 0),
    ],
)  # fmt: skip
def test_a_number_in_any_form_is_that_number(write, text, value):
    recipe = load_recipe(text_of(write(), f"lambda: {text}"))
    assert recipe.scaling_coefficient == value
    path = write(scaling_coefficients=["LATER"])
    path.write_text(path.read_text().replace("LATER", text))
    assert load_recipe(path).scaling_coefficients == [value]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("010", "line 7: 010 is a number in base 8 or 60 to YAML; write it in base 10"),
        ("1:30", "line 7: 1:30 is a number in base 8 or 60"),
        (".inf", "lambda inf: one finite number is expected"),
        ("-.INF", "lambda -inf: one finite number"),
        (".nan", "lambda nan: one finite number"),
        ("infinity", "lambda 'infinity': one finite number"),
        ("0o10", "lambda '0o10': one finite number"),
        ("1,5", "lambda '1,5': one finite number"),
        ("1.5.2", "lambda '1.5.2': one finite number"),
        ("50%", "lambda '50%': one finite number"),
        ("yes", "lambda True: one finite number"),
        ("", "lambda None: one finite number"),
        ("2026-01-01", "lambda .*: one finite number"),
    ],
)
def test_what_is_no_number_or_two_is_an_error(write, text, message):
    path = text_of(write(), f"lambda: {text}")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("key", ["seed", "scaling_coefficients"])
def test_yes_is_not_one(write, key):
    value = [True, 0.5] if key == "scaling_coefficients" else True
    with pytest.raises(RecipeError, match=f"{key}: .*True.*: a number is expected"):
        load_recipe(write(**{key: value}))
    assert load_recipe(write(seed="1e3")).seed == 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 1\n", "lines 6 and 7: seed is given twice; keep one"),
        ("parameters: {density: 0.2, density: 0.3}\n", "lines 6 and 6: density is given twice"),
        ('"seed": 1\nseed: 2\n', "seed is given twice"),
        ("evaluation:\n  references:\n    a: base\n    b: base\n    a: base\n", "a is given twice"),
    ],
)
def test_a_key_given_twice_is_an_error(write, text, message):
    path = write()
    path.write_text(path.read_text() + text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_mapping_may_take_from_another_and_say_otherwise(write):
    path = write(models=None)
    path.write_text(
        path.read_text() + "models:\n- {model: experts/ocr, parameters: &a {weight: 1, density: 1}}"
        "\n- {model: experts/vqa, parameters: {<<: *a, weight: 2}}\n"
    )
    assert load_recipe(path).options()["weights"] == [1, 2]


@pytest.mark.parametrize("spelling", ["./base", "base/", "experts/../base", "link", "ABSOLUTE"])
def test_the_base_is_known_by_any_spelling_of_its_folder(write, tmp_path, spelling):
    study = tmp_path / "study"
    (study / "link").symlink_to("base")
    spelling = str(study / "base") if spelling == "ABSOLUTE" else spelling
    ocr, vqa = {"model": "experts/ocr"}, {"model": f"{spelling}+experts/vqa"}
    for base, listed in (("base", spelling), (spelling, "base")):
        recipe = load_recipe(write(base_model=base, models=[{"model": listed}, ocr, vqa]))
        assert list(recipe.experts) == ["ocr", "vqa"]
        assert recipe.base_model == os.path.join("..", "study", "base")
    assert load_recipe(write(tokenizer_source=spelling)).base_model == recipe.base_model
    both = {"tokenizer_source": "base", "tokenizer": {"source": "base"}}
    with pytest.raises(RecipeError, match="tokenizer and tokenizer_source are both given"):
        load_recipe(write(**both))


@pytest.mark.parametrize(
    ("base", "listed", "same"),
    [
        ("owner/Base", "owner/base", True),
        ("owner/base", "Owner/Base@main", True),
        ("owner/base@v1", "OWNER/base@v1", True),
        ("owner/base@v1", "owner/base", False),
        ("owner/base@v1", "owner/base@V1", False),
        ("https://host/base", "https://host/base/", True),
    ],
)
def test_the_base_is_known_by_any_spelling_of_its_hub_id(write, base, listed, same):
    recipe = load_recipe(write(base_model=base, models=[{"model": listed}, {"model": "ocr"}]))
    assert len(recipe.experts) == 1 + (not same)
