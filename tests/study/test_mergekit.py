"""mergekit's files: its definitions, and the numbers that mergekit itself made of 264 files."""

import math
import re
import warnings
from collections import Counter
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch
import yaml
from mergekit_cases import (
    CASES,
    DENSITIES,
    DTYPES,
    EXPERTS,
    GOLDEN,
    MORE,
    ROUNDED,
    SHAPES,
    WEIGHTS,
    all_files,
    case,
    digest,
    write_models,
)
from safetensors import safe_open

from optmerge_core import load_recipe, merge, open_checkpoint
from optmerge_core.methods.registry import METHODS, check_options
from optmerge_core.methods.ties import ties
from optmerge_core.study.recipe import RecipeError


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Dtype -> folder of a tiny Llama and four experts in it, which differ in every parameter."""
    root = tmp_path_factory.mktemp("llama")
    write_models(root)
    return {dtype: root / dtype for dtype in DTYPES}


@pytest.fixture(scope="module", params=DTYPES[:2])
def models(request, roots):
    """The folders of one dtype, and what is in them."""
    root = roots[request.param]
    tensors = {name: dict(open_checkpoint(root / name)) for name in ("base", *MORE)}
    return SimpleNamespace(root=root, tensors=tensors)


def write(folder, content):
    path = folder / "mergekit.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def merged_here(path, output, **changes):
    """The file's merge, as `python -m optmerge_core merge` makes it: name -> tensor."""
    recipe = load_recipe(path)
    settings = {
        "method": recipe.merge_method,
        "method_options": recipe.options(),
        "scaling_coefficient": recipe.scaling_coefficient,
        "dtype": recipe.dtype,
        "scope": recipe.scope,
    }
    with warnings.catch_warnings():  # a linear merge may list the base model, which is remarked
        warnings.simplefilter("ignore")
        merge(recipe.base_model, recipe.experts, output, **(settings | changes))
    return dict(open_checkpoint(output))


def by_definition(content, tensors, name):
    """One merged parameter in float64, entry by entry, from mergekit's documented definitions."""
    method, given = content["merge_method"], content["parameters"]
    experts = [m for m in content["models"] if m["model"] != "base"]
    if method == "linear" and "base_model" in content and "weight" in given:
        experts = [*experts, {"model": "base"}]
    own = [given | expert.get("parameters", {}) for expert in experts]
    weights = [parameters["weight"] for parameters in own]
    values = [tensors[e["model"]][name].double().numpy() for e in experts]
    normalize = given.get("normalize", method in ("linear", "ties"))
    if method == "linear":
        total = sum(w * value for w, value in zip(weights, values, strict=True))
        return total / sum(weights) if normalize else total
    base = tensors["base"][name].double().numpy()
    deltas = []
    for value, parameters in zip(values, own, strict=True):
        delta = (value - base).ravel()
        if method == "ties":
            count = max(1, int(parameters.get("density", 1.0) * delta.size))
            # Magnitudes are compared in single precision; of equal ones the first in memory count.
            order = torch.from_numpy(delta).float().abs().argsort(descending=True, stable=True)
            delta[order[count:]] = 0
        deltas.append(parameters["weight"] * delta)
    merged = np.zeros(base.size)
    for entry, column in enumerate(zip(*deltas, strict=True)):
        counted = list(zip(weights, column, strict=True))
        if method.endswith("ties"):
            positive = sum(column) >= 0
            counted = [(w, x) for w, x in counted if x != 0 and (x > 0) == positive]
        total = sum(w for w, _ in counted)
        by = total if normalize and abs(total) > 1e-8 else 1
        merged[entry] = sum(x for _, x in counted) / by
    return base + given.get("lambda", 1.0) * merged.reshape(base.shape)


@pytest.mark.parametrize("name", CASES)
def test_a_file_gives_what_mergekit_defines(models, tmp_path, name):
    """With `scope: all`, every parameter of the model; without, the merged layers."""
    path = write(models.root, CASES[name] | {"scope": "all"})
    merged = merged_here(path, tmp_path / "all")
    assert merged.keys() == models.tensors["base"].keys() and len(merged) == 12
    expected = {n: by_definition(CASES[name], models.tensors, n) for n in merged}
    for parameter, tensor in merged.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor, expected[parameter], rtol=1e-5, atol=2e-7)
    layers = merged_here(path, tmp_path / "layers", scope="linear")
    same = {n for n in layers if torch.equal(layers[n], merged[n])}
    assert same == {n for n in layers if layers[n].ndim == 2 and ".layers." in n}


FILES = all_files()
LINEAR = ("linear", "task_arithmetic", "dare_linear")
REFUSED = "normalize false of linear|add up to 0|the merged model would be the base model"


@pytest.fixture(scope="module")
def golden():
    """Name of a file -> all entries of the model that mergekit made of it, float32."""
    with safe_open(GOLDEN, "pt") as file:
        made_of = file.metadata()["files"]
        values = file.get_tensor("merged")
    assert made_of == digest(FILES), "run tests/make_mergekit_golden.py, which says how"
    return dict(zip(FILES, values, strict=True))


def quick(names, last):
    """All names, those from `last` on to be tested where there is time."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (number >= last))
        for number, name in enumerate(names)
    ]


@pytest.mark.parametrize("name", quick(FILES, 2 * len(CASES | ROUNDED) + 20))
def test_a_file_gives_what_mergekit_made_of_it(roots, golden, tmp_path, monkeypatch, name):
    """Every entry is mergekit's to float32 rounding and the output's; or the file is refused.

    mergekit computes in `dtype`, and this package in float32 whatever it is: where that has 16
    bits, each weight that mergekit reads and computes has its rounding. Which entries stay of those
    whose magnitude is TIES's threshold, mergekit's sort decides: these are left out.
    """
    dtype, text = FILES[name]
    content = yaml.safe_load(text)
    monkeypatch.chdir(roots[dtype])
    path = roots[dtype] / "mergekit.yaml"
    path.write_text(text + "scope: all\n")
    try:
        ours = merged_here(path, tmp_path / "ours")
    except ValueError as error:
        assert content["merge_method"] == "linear" and re.search(REFUSED, str(error))
        return
    stored = content.get("out_dtype", content["dtype"])
    assert {tensor.dtype for tensor in ours.values()} == {getattr(torch, stored)}
    values = torch.cat([ours[parameter].float().flatten() for parameter in SHAPES])
    difference, theirs = (values - golden[name]).abs(), golden[name].abs()
    rounding = torch.finfo(getattr(torch, stored)).eps
    allowed = 5e-7 * theirs.max() + (rounding * theirs if stored != "float32" else 0)
    if content["dtype"] != "float32":
        assert content["merge_method"] in LINEAR
        allowed = 8 * torch.finfo(getattr(torch, content["dtype"])).eps * theirs.max()
    excess = (difference - allowed)[~at_a_threshold(load_recipe(path))]
    assert (excess <= 0).all(), f"off by {excess.max():.1e}"


def at_a_threshold(recipe):
    """Where an expert's entry is as large as the smallest that TIES keeps, and as one it drops."""
    base = open_checkpoint(recipe.base_model)
    found = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    densities = recipe.options().get("density", 1.0) if recipe.merge_method == "ties" else 1.0
    for number, location in enumerate(recipe.experts.values()):
        expert = open_checkpoint(location)
        density = densities[number] if isinstance(densities, list) else densities
        for name, place in found.items():
            sizes = (expert[name].float() - base[name].float()).abs()
            kept = max(1, int(density * sizes.numel()))
            limit = sizes.flatten().sort(descending=True).values[kept - 1]
            if (sizes >= limit).sum() > kept:
                place |= sizes == limit
    return torch.cat([place.flatten() for place in found.values()])


def test_mergekit_rescales_what_dare_keeps_to_the_same_sum_of_magnitudes(roots):
    """By the paper, as here, it is divided by the share that is kept on average."""
    with safe_open(GOLDEN, "pt") as file:
        sizes = [math.prod(shape) for shape in SHAPES.values()]
        dropped = dict(zip(SHAPES, file.get_tensor("dropped").split(sizes), strict=True))
    base, expert = (open_checkpoint(roots["float32"] / name) for name in ("base", "ocr"))
    for name, merged in dropped.items():
        theirs = merged - base[name].flatten()
        ours = (expert[name] - base[name]).flatten()
        kept = theirs != 0
        factor = ours.abs().sum() / ours[kept].abs().sum()
        torch.testing.assert_close(theirs[kept], ours[kept] * factor, atol=1e-6, rtol=1e-4)


def test_the_golden_files_are_of_all_kinds():
    contents = [yaml.safe_load(text) for _, text in FILES.values()]
    methods = Counter(content["merge_method"] for content in contents)
    assert len(contents) == 264 and min(methods.values()) >= 29
    assert set(methods) == {"linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"}
    exact = [x for x in contents if x["dtype"] == "float32" and "out_dtype" not in x]
    assert len(exact) > 150


def test_the_command_merges_the_file_as_it_is(models, tmp_path, capsys):
    pytest.importorskip("nbformat")
    from optmerge_core.__main__ import main

    path = write(models.root, CASES["ties"] | {"scope": "all", "tokenizer_source": "base"})
    assert main(["merge", str(path), "--output", str(tmp_path / "out")]) == 0
    assert "12 parameters of 3 experts merged by ties" in capsys.readouterr().out
    merged, expected = dict(open_checkpoint(tmp_path / "out")), merged_here(path, tmp_path / "own")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())
    # The model card's recipe makes the same model again.
    card = (tmp_path / "out" / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    again = load_recipe(write(tmp_path, yaml.safe_load(card)))
    original = load_recipe(path)
    for name in ("options", "scaling_coefficient", "scope", "dtype", "merge_method", "trim"):
        ours, theirs = getattr(again, name), getattr(original, name)
        assert (ours() if callable(ours) else ours) == (theirs() if callable(theirs) else theirs)


# By hand


def test_ties_by_hand():
    """Weights change who is elected, the average's weights, and a density is each expert's own."""
    stack = torch.tensor([[4.0, -3.0, 2.0, 1.0], [-1.0, 5.0, 3.0, -2.0]])
    options = {"density": [0.5, 1.0], "weights": [3.0, 1.0], "rule": "mergekit"}
    # Kept: 4 -3 0 0 and all; weighted: 12 -9 0 0 and -1 5 3 -2; elected: + - + -.
    assert ties(stack, **options).tolist() == [4, -3, 3, -2]
    assert ties(stack, **options, normalize=False).tolist() == [12, -9, 3, -2]
    # Together: where both agree, (3·2 + 1·3) / 4.
    assert ties(stack, **(options | {"density": 1.0}))[2].item() == 2.25


def test_the_rules_differ_by_one_entry_and_in_a_draw():
    stack = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert ties(stack, density=0.5).tolist() == [0, 2, 3, 4]
    assert ties(stack, density=0.5, rule="mergekit").tolist() == [0, 0, 3, 4]
    assert ties(stack, density=0.1, rule="mergekit").tolist() == [0, 0, 0, 4]
    draw = torch.tensor([[1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]])
    assert ties(draw, density=1.0).tolist() == [-1, -2, -3]
    assert ties(draw, density=1.0, rule="mergekit").tolist() == [1, -2, -3]


def test_averages_by_hand():
    stack = torch.tensor([[2.0, 4.0], [8.0, -2.0]])
    assert METHODS["weight_average"](stack, weights=[1, 3]).tolist() == [6.5, -0.5]
    assert METHODS["task_arithmetic"](stack, weights=[0.5, -1]).tolist() == [-7, 4]
    assert METHODS["dare_task_arithmetic"](stack, drop_rate=[0, 0.0]).tolist() == [10, 2]


@pytest.mark.parametrize("rule", ["released", "mergekit"])
@pytest.mark.parametrize("shape", [(3, 7), (3, 5, 70)])
def test_equal_weights_and_densities_change_nothing(rule, shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = ties(stack, density=0.4, rule=rule)
    weighted = ties(stack, density=[0.4] * 3, weights=[2.0] * 3, rule=rule)
    torch.testing.assert_close(plain, weighted)
    assert torch.equal(ties(stack, density=[0.4] * 3, rule=rule), plain)


def test_each_expert_is_dropped_at_its_own_rate():
    stack = torch.ones(2, 20_000)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    total = METHODS["dare_task_arithmetic"](
        stack, drop_rate=[0.0, 0.9], weights=[0.0, 1.0], generator=generators
    )
    assert total.unique().tolist() == pytest.approx([0.0, 10.0])
    assert total.mean().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("ties", {"weights": [1, 2], "density": [0.1, 0.2, 0.3]}, "2 values for 3 experts"),
        ("ties", {"rule": "other"}, "rule is 'other'; valid are 'released', 'mergekit'"),
        ("ties", {"normalize": 2}, "normalize is 2"),
        ("ties", {"density": [0.5, 0.0], "rule": "mergekit"}, "density is 0"),
        ("dare_ties", {"drop_rate": [0.5, 1.0]}, "drop_rate is 1"),
        ("weight_average", {"weights": [1, -1]}, "add up to 0"),
        ("task_arithmetic", {"weights": [1, float("nan")]}, "finite"),
    ],
)
def test_wrong_lists_are_refused_before_any_work(method, options, text, monkeypatch):
    """By the methods themselves, as outside of tests, where nobody checks their annotations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=text):
        check_options(method, options)


def test_a_list_has_a_value_for_each_expert(models, tmp_path):
    with pytest.raises(ValueError, match="weights has 2 values for 3 experts"):
        check_options("ties", {"weights": [1, 2]}, experts=3)
    locations = {name: models.root / name for name in EXPERTS}
    for options, trim, text in [
        ({"weights": [1.0, 2.0]}, "tensor", "2 values for 3 experts"),
        ({"density": list(DENSITIES)}, "model", "trim='model' takes one density"),
    ]:
        with pytest.raises(ValueError, match=text):
            merge(
                models.root / "base", locations, tmp_path / "out",
                method="ties", method_options=options, trim=trim,
            )  # fmt: skip
    assert not (tmp_path / "out").exists()


# The file's keys


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that writes a file over folders that exist, with changes, and loads it."""
    for folder in ("base", "ocr", "vqa", "chart"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)

    def load(content, **changes):
        return load_recipe(write(tmp_path, content | changes))

    return load


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("linear", "weight_average", {"weights": [0.25, 0.5, 1.25]}),
        ("linear_counts_the_base", "weight_average", {}),
        ("task_arithmetic", "task_arithmetic", {"weights": [0.25, 0.5, 1.25]}),
        (
            "ties",
            "ties",
            {"rule": "mergekit", "weights": [0.25, 0.5, 1.25], "density": [0.3, 0.55, 0.9]},
        ),
        ("ties_one_for_all", "ties", {"rule": "mergekit", "weights": [0.5] * 3, "density": 0.33}),
        ("ties_whole", "ties", {"rule": "mergekit", "weights": [0.25, 0.5, 1.25], "density": 1.0}),
        ("dare_linear", "dare_task_arithmetic", {"weights": [0.25, 0.5, 1.25], "drop_rate": 0.0}),
    ],
)
def test_files_become_methods_and_options(load, name, method, options):
    recipe = load(CASES[name])
    assert recipe.merge_method == method and recipe.options() == options
    assert recipe.scaling_coefficient == CASES[name]["parameters"].get("lambda", 1.0)


def test_without_weights_a_recipe_means_the_paper(load):
    """mergekit would refuse these files: it asks for a weight."""
    assert load(case("ties", base=True)).options() == {}
    assert load(case("ties", base=True, density=0.5)).options() == {"density": 0.5}
    assert load(case("dare_linear", base=True)).options() == {}
    densities = load(case("dare_linear", None, (0.5, 0.75, 1.0), base=True)).options()
    assert densities == {"drop_rate": [0.5, 0.25, 0.0]}


def test_the_base_in_a_mean(load):
    alone = load(CASES["linear"])
    assert alone.base_model == "ocr" and list(alone.experts) == list(EXPERTS)
    counted = load(CASES["linear_counts_the_base"])
    assert list(counted.experts) == [*EXPERTS, "base_model"]
    assert counted.experts["base_model"] == counted.base_model == "base"
    assert list(load(case("linear", WEIGHTS, base=True)).experts) == list(EXPERTS)
    listed = load(case("linear", base=True, listed=True, weight=1.0))
    assert list(listed.experts) == ["base", *EXPERTS]


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_source": "base"},
        {"tokenizer": {"source": "base"}},
        {"tokenizer_source": "base", "tokenizer": None, "chat_template": None},
        {"tokenizer_source": "base", "out_dtype": "bfloat16"},
        {"models": list(EXPERTS), "parameters": {"weight": 1.0}},
        {"models": [{"model": "base+ocr", "parameters": {"weight": 1}}, {"model": "vqa"}][:1]},
        {"parameters": {"int8_mask": True, "rescale": False, "lambda": 1}},
    ],
)
def test_keys_that_change_nothing_here(load, changes):
    recipe = load(case("ties", WEIGHTS, base=True), **changes)
    assert recipe.options()["density"] == 1.0 and next(iter(recipe.experts.values())) == "ocr"
    assert recipe.dtype == changes.get("out_dtype", "float32")


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Red?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Blue?"},
]
SAID = {  # by the formats' own descriptions
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRed?<|im_end|>\n"
    "<|im_start|>assistant\nNo.<|im_end|>\n<|im_start|>user\nBlue?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nRed?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBlue?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Red?\n[|assistant|]No.[|endofturn|]\n"
    "[|user|]Blue?\n[|assistant|]",
    "alpaca": "Be brief.\n\n### Instruction:\nRed?\n\n### Response:\nNo.\n\n"
    "### Instruction:\nBlue?\n\n### Response:\n",
}


@pytest.mark.parametrize("name", SAID)
def test_a_chat_template_that_mergekit_has_a_name_for(load, name):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = load(CASES["ties"], chat_template=name).chat_template
    options = {"chat_template": template, "add_generation_prompt": True, "bos_token": "<s>"}
    (text,), _ = render_jinja_template(conversations=[CONVERSATION], **options)
    assert text == SAID[name]
    messages, options = [CONVERSATION[1:3]], {"chat_template": template, "bos_token": "<s>"}
    (text,), _ = render_jinja_template(conversations=messages, **options)
    shown = {"chatml": "<|im_end|>\n", "llama3": "<|eot_id|>", "exaone": "[|endofturn|]\n"}
    assert "Red?" in text and "Be brief." not in text
    assert text.endswith("No." + shown.get(name, ""))


def test_a_chat_template_is_auto_or_jinja(load):
    for template in (
        "auto",
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        None,
    ):
        assert load(CASES["ties"], chat_template=template).chat_template == template


TIES = CASES["ties"]
SCALED = case("linear", WEIGHTS, normalize=False)


@pytest.mark.parametrize(
    ("content", "changes", "text"),
    [
        (TIES, {"slices": [{"sources": []}]}, "slices: .*whole models under models"),
        (TIES, {"modules": {"default": {}}}, "modules: .*whole models under models"),
        (TIES, {"tokenizer_source": "union"}, "tokenizer_source 'union': .*write base"),
        (TIES, {"tokenizer_source": "ocr"}, "tokenizer_source 'ocr'"),
        (TIES, {"tokenizer": {"source": "union"}}, "tokenizer_source 'union'"),
        (TIES, {"tokenizer": {"source": "base", "tokens": {"<a>": {}}}}, "tokenizer.tokens: "),
        (TIES, {"tokenizer": "union"}, "tokenizer_source 'union'"),
        (TIES, {"chat_template": "chat"}, "chat_template 'chat': give auto, alpaca, chatml, exa"),
        (TIES, {"chat_template": "{{ messages }}"}, "chat_template .*template in Jinja"),
        (TIES, {"chat_template": ["auto"]}, "chat_template .*template in Jinja"),
        (TIES, {"dtype": "int8"}, "dtype: .*bfloat16"),
        (TIES, {"parameters": {"int8_mask": 3}}, "int8_mask 3: true or false"),
        (TIES, {"parameters": {"rescale": True}}, "rescale true of ties"),
        (TIES, {"parameters": {"epsilon": 0.1}}, "epsilon.*density"),
        (TIES, {"parameters": {"lambda": [0, "x"]}}, "lambda 'x': one finite number"),
        (case("ties", (1, None, 1), base=True), {}, "weight: expert 2 of 3 has none"),
        (case("dare_linear", WEIGHTS, base=True, density=0.5, rescale=False), {}, "rescale false"),
        (SCALED, {}, "normalize false of linear: .*add up to 2"),
        (case("linear", (1, 1, -2)), {}, "add up to 0"),
        (case("linear", WEIGHTS, **{"lambda": 0.5}), {}, "parameters.lambda: mergekit's linear"),
        (case("optmerge", WEIGHTS, base=True), {}, "weight of optmerge: only 1"),
        (case("optmerge", base=True, normalize=True), {}, "optmerge has no option 'normalize'"),
        (case("ties", WEIGHTS), {}, "base_model: Field required"),
        (case("karcher", base=True), {}, "no merge method 'karcher'"),
        (case("ties", base=True, merge=3), {"merge_method": ["ties"]}, "merge_method: .*string"),
        (TIES, {"models": [{"model": "other+ocr"}]}, r"'other\+ocr' is .*base_model\+adap"),
        (TIES, {"models": [{"model": {"path": "ocr"}}]}, "models.0.model: .*string"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_one_error(load, content, changes, text):
    with pytest.raises(RecipeError, match=text) as caught:
        load(content, **changes)
    assert "mergekit.yaml: " in str(caught.value) and "\n" not in str(caught.value)
