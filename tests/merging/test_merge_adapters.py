"""Adapters merged into an adapter: equal to the merge of the whole matrices, or refused."""

import json
import shutil
import warnings

import pytest
import torch
from lora import LINEAR, make_adapter, make_lora_family, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from optmerge_core import METHODS, merge, merge_adapters, open_checkpoint
from optmerge_core.checkpoints.factors import Factors
from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.names import PREFIX
from optmerge_core.checkpoints.open import open_expert
from optmerge_core.merging.families import mergeable
from optmerge_core.merging.loop import merge_tensors
from optmerge_core.merging.spaces import merge_cores, merge_factors


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_lora_family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("weight_average", {}),
        ("task_arithmetic", {}),
        ("tsv", {}),
        ("iso_c", {}),
        ("iso_c", {"mean_over": "nonzero"}),
        ("iso_c", {"then": "svc"}),
        ("tsv", {"then": "svc"}),
        ("task_arithmetic", {"then": {"svc": {"alpha": 0.8}}}),
        ("optmerge", {"preset": "lora", "then": "svc"}),
        ("swudi", {}),
        ("iso_cts", {"common_ratio": 0.2}),
        ("dc_merge", {}),
        ("ssam", {"rank_ratio": 0.1}),
        ("model_stock", {}),
        ("wudi", {"optimizer": "sgd", "learning_rate": 1e-2}),
        ("optmerge", {"preset": "lora", "learning_rate": 1e-2}),
        ("optmerge", {"preset": "lora", "learning_rate": 0.2, "learning_rate_unit": "rms"}),
        ("wudi", {"optimizer": "sgd", "learning_rate_unit": "rms"}),
        ("optmerge", {"preset": "lora", "learning_rate_unit": "rms"}),
        ("optmerge", {"preset": "lora", "rank_ratio": 0.05, "learning_rate": 1e-2}),
        ("optmerge", {"preset": "modality"}),
        ("optmerge", {"preset": "modality", "rank_ratio": None}),
        ("optmerge", {"preset": "lora", "optimizer": "ridge", "shrink": None}),
        ("wudi", {"optimizer": "ridge"}),
        ("optmerge", {"preset": "lora", "optimizer": "ridge", "shrink": 0.3}),
        ("optmerge", {"optimizer": "sgd", "preset": "full", "learning_rate": 1e-2}),
    ],
)
def test_merged_adapter_equals_the_dense_merge(family, tmp_path, method, options):
    base, experts = family
    weights = open_checkpoint(base)
    opened = {name: open_expert(folder, weights) for name, folder in experts.items()}
    names = mergeable(weights.shapes(), "qwen2")
    dense = merge_tensors(weights, opened, names, method=method, method_options=options)
    folder = merge_adapters(
        experts, tmp_path / "out", method=method, method_options=options, scaling_coefficient=0.7
    )
    merged = open_expert(folder, weights)
    for name in names:
        error = (merged.task_vector(name) - 0.7 * dense[name]).norm() / dense[name].norm()
        assert error < 1e-5, (name, error)


def test_optmerges_preset_is_lora_unless_told_otherwise(family, tmp_path):
    """Named nowhere, named, and with another option beside it."""
    _, experts = family

    def merged(name, **arguments) -> dict:
        folder = merge_adapters(experts, tmp_path / name, **arguments)
        report = json.loads((folder / "merge_report.json").read_text())
        return report["method_options"], (folder / "adapter_model.safetensors").read_bytes()

    options, default = merged("default")
    assert options == {"preset": "lora"}
    assert merged("lora", method_options={"preset": "lora"})[1] == default
    assert merged("steps", method_options={"steps": 300})[1] == default
    assert merged("modality", method_options={"preset": "modality"})[1] != default


def test_merged_adapter_loads_with_peft(family, tmp_path):
    base, experts = family
    folder = merge_adapters(experts, tmp_path / "out", method="weight_average")
    model = PeftModel.from_pretrained(tiny_model(), folder).merge_and_unload().state_dict()
    merge(base, experts, tmp_path / "dense", method="weight_average")
    dense = open_checkpoint(tmp_path / "dense")
    for name in dense:
        torch.testing.assert_close(model[name], dense[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "space", "rank"),
    [
        ("task_arithmetic", {"space": "core"}, 8),
        ("dare_ties", {"space": "core", "spectrum": "even"}, 8),
        ("task_arithmetic", {"space": "compressed", "rank": 20}, 8),
        ("ties", {"space": "compressed", "rank": 2}, 2),
    ],
)
def test_merged_in_a_space(family, tmp_path, method, space, rank):
    """Of sums nothing is lost, where the rank allows; what is drawn hangs on the seed alone."""
    base, experts = family
    folder = merge_adapters(experts, tmp_path / "out", method=method, **space, seed=1)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == rank
    merged, weights = open_expert(folder, open_checkpoint(base)), open_checkpoint(base)
    parts = [open_expert(path, weights) for path in experts.values()]
    turned = dict(reversed(experts.items()))
    order = open_expert(
        merge_adapters(turned, tmp_path / "turned", method=method, **space, seed=1), weights
    )
    other = open_expert(
        merge_adapters(experts, tmp_path / "other", method=method, **space, seed=2), weights
    )
    for name in mergeable(weights.shapes(), "qwen2"):
        task_vector = merged.task_vector(name)
        torch.testing.assert_close(order.task_vector(name), task_vector, atol=1e-6, rtol=1e-4)
        assert torch.equal(other.task_vector(name), task_vector) == (method != "dare_ties")
        if method == "task_arithmetic":
            total = sum(part.task_vector(name) for part in parts)
            torch.testing.assert_close(task_vector, total, atol=1e-6, rtol=1e-5)


def test_a_space_that_is_none_is_refused_before_any_work(family, tmp_path):
    _, experts = family
    for options, message in (
        ({"space": "compressed"}, "needs that of the merged adapter"),
        ({"rank": 4}, "rank is for space='compressed'"),
        ({"method": "slerp", "space": "core"}, "slerp merges the base model and one expert"),
        ({"method": "orthomerge", "space": "core"}, "orthomerge needs the base's own matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_adapters(experts, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_merged_rank_is_at_most_the_sum_of_ranks(family, tmp_path):
    _, experts = family
    folder = merge_adapters(experts, tmp_path / "out", method="task_arithmetic")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 3 + 2 + 3


def test_one_adapter_comes_back(family, tmp_path):
    _, experts = family
    folder = merge_adapters({"e0": experts["e0"]}, tmp_path / "out", method="weight_average")
    before, after = (Factors(open_checkpoint(f, adapter=True)) for f in (experts["e0"], folder))
    for module in before:
        (b, a), (d, c) = before[module], after[module]
        torch.testing.assert_close(d @ c, b @ a, atol=1e-6, rtol=1e-5)


def test_a_layer_that_only_some_experts_adapt(tmp_path):
    folders = {
        "attention": make_adapter(tmp_path / "a", 1, target_modules=["q_proj", "v_proj"]),
        "mlp": make_adapter(tmp_path / "b", 2, target_modules=["v_proj", "up_proj"]),
    }
    tiny_model().save_pretrained(tmp_path / "base")
    weights = open_checkpoint(tmp_path / "base")
    merged = open_expert(
        merge_adapters(folders, tmp_path / "out", method="weight_average"), weights
    )
    parts = [open_expert(folder, weights) for folder in folders.values()]
    for name in mergeable(weights.shapes(), "qwen2"):
        mean = sum(part.task_vector(name) for part in parts) / 2
        torch.testing.assert_close(merged.task_vector(name), mean, atol=1e-6, rtol=1e-5)


def test_cores_of_any_shape_give_what_the_whole_matrices_give():
    generator = torch.Generator().manual_seed(3)
    for rows, columns, ranks in ((9, 40, (4, 4, 4)), (40, 9, (2, 5, 1)), (12, 12, (6, 6, 6))):
        pairs = [
            (
                torch.randn(rows, r, generator=generator),
                torch.randn(r, columns, generator=generator),
            )
            for r in ranks
        ]
        stack = torch.stack([(b @ a).double() for b, a in pairs])
        for method in ("tsv", "iso_c", "swudi"):
            b, a = merge_factors(pairs, method, {}, 1.0, (rows, columns))
            expected = METHODS[method](stack).float()
            assert (b @ a - expected).norm() < 1e-5 * expected.norm(), (method, rows, columns)
        assert merge_cores(stack, "tsv", {}, (rows, columns)).shape == (rows, columns)


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("ties", {}, "single entries"),
        ("dare_ties", {}, "single entries"),
        ("wudi", {}, "optimizer='sgd'"),
        ("optmerge", {"preset": "full"}, "optimizer='sgd'"),
        ("optmerge", {"preset": "full", "optimizer": None}, "optimizer='sgd'"),
        ("aswudi", {}, "no expert uses"),
        ("ties", {"then": "svc"}, "single entries"),
        ("tsv", {"null_directions": "fill"}, "tsv with null_directions='fill' leaves the span"),
        ("iso_c", {"null_directions": "fill"}, "iso_c with null_directions='fill' leaves"),
    ],
)
def test_methods_that_leave_the_span_are_refused(family, tmp_path, method, options, reason):
    _, experts = family
    with pytest.raises(ValueError, match=reason):
        merge_adapters(experts, tmp_path / "out", method=method, method_options=options)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_overwritten_by_its_own_merge(family, tmp_path):
    experts = {name: shutil.copytree(path, tmp_path / name) for name, path in family[1].items()}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output in (experts["e1"], experts["e1"] / "merged"):
        with pytest.raises(ValueError, match=r"(holds|is inside) expert e1: choose another"):
            merge_adapters(experts, output, method="weight_average", overwrite=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def start_adapter(folder, how, **settings):
    """An adapter that began by changing its base's weights, and was trained a little."""
    config = {"r": 2, "target_modules": LINEAR, "init_lora_weights": how} | settings
    model = get_peft_model(tiny_model(), LoraConfig(**config))
    generator = torch.Generator().manual_seed(len(how))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["task_arithmetic", "iso_c"])
def test_adapters_that_began_by_changing_their_base(family, tmp_path, method):
    base, experts = family
    started = {how: start_adapter(tmp_path / how, how) for how in ("pissa", "olora")}
    experts = {"plain": experts["e0"]} | started
    with pytest.raises(CheckpointError, match=r"began by changing .*'pissa'\); give that as base"):
        merge_adapters(experts, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()
    folder = merge_adapters(experts, tmp_path / "out", method=method, base_model=base)
    merge(base, experts, tmp_path / "dense", method=method)
    dense = open_checkpoint(tmp_path / "dense")
    model = PeftModel.from_pretrained(tiny_model(), folder).merge_and_unload().state_dict()
    for name in dense:
        torch.testing.assert_close(model[name], dense[name], atol=1e-6, rtol=1e-5)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == 3 + 2 * 2 + 2 * 2


def test_no_setting_of_an_experts_training_is_handed_on(family, tmp_path):
    base, _ = family
    odd = {"lora_dropout": 0.5, "use_rslora": True, "layers_to_transform": [0], "revision": "main"}
    experts = {"odd": start_adapter(tmp_path / "odd", "pissa", **odd)}
    folder = merge_adapters(experts, tmp_path / "out", method="weight_average", base_model=base)
    config, plain = LoraConfig.from_pretrained(folder).to_dict(), LoraConfig().to_dict()
    changed = {field for field in config if config[field] != plain[field]}
    named = {
        "auto_mapping",
        "revision",
        "base_model_name_or_path",
        "peft_version",
        "inference_mode",
    }
    assert changed - named == {"r", "lora_alpha", "target_modules"}


@pytest.mark.filterwarnings("ignore:(Model with|Model has|Setting `save_emb):UserWarning")
def test_a_heads_weight_that_all_adapters_have_is_kept(tmp_path):
    experts = {n: make_adapter(tmp_path / n, 1, target_modules=["lm_head"]) for n in "ab"}
    folder = merge_adapters(experts, tmp_path / "out", method="weight_average")
    head = f"{PREFIX}lm_head.base_layer.weight"
    kept = load_file(folder / "adapter_model.safetensors")[head]
    assert torch.equal(kept, tiny_model().lm_head.weight)
    path = experts["b"] / "adapter_model.safetensors"
    save_file(load_file(path) | {head: kept + 1}, path)
    with pytest.raises(CheckpointError, match="lm_head: expert b has its base's weight beside"):
        merge_adapters(experts, tmp_path / "other", method="weight_average")
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore:(Model with|Model has|Setting `save_emb):UserWarning")
@pytest.mark.parametrize("known", ["base_model", "config"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapted_head_that_the_base_ties_is_named(family, tmp_path, known, tied):
    base = shutil.copytree(family[0], tmp_path / "base")
    settings = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (base / "config.json").write_text(json.dumps(settings))
    experts = {n: make_adapter(tmp_path / n, 1, target_modules=["lm_head"]) for n in "ab"}
    for folder in experts.values():
        path = folder / "adapter_config.json"
        named = {"base_model_name_or_path": str(base) if known == "config" else None}
        path.write_text(json.dumps(json.loads(path.read_text()) | named))
    given = {"base_model": base} if known == "base_model" else {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = merge_adapters(experts, tmp_path / "out", method="task_arithmetic", **given)
    said = [str(warning.message) for warning in told if "merge_and_unload" in str(warning.message)]
    assert len(said) == tied
    if tied:
        assert said[0].startswith("lm_head is adapted, and the base ties it to its embeddings")
        embeddings = tiny_model().model.embed_tokens.weight
        merged = PeftModel.from_pretrained(tiny_model(), out).merge_and_unload()
        assert not torch.equal(merged.model.embed_tokens.weight, embeddings)
        with pytest.warns(match="lm_head.weight is not the embeddings"):
            merge(base, experts, tmp_path / "whole", method="task_arithmetic", scope="all")
        whole = open_checkpoint(tmp_path / "whole")
        assert torch.equal(whole["model.embed_tokens.weight"], embeddings)
        torch.testing.assert_close(whole["lm_head.weight"], merged.lm_head.weight)


@pytest.mark.filterwarnings("ignore:.*whole weights, which are taken")
def test_a_whole_model_is_no_adapter(family, tmp_path):
    base, experts = family
    both = shutil.copytree(base, tmp_path / "both")
    shutil.copytree(experts["e0"], both, dirs_exist_ok=True)
    for folder in (base, both):
        with pytest.raises(
            CheckpointError, match=f"{folder} holds whole weights, where an adapter"
        ):
            merge_adapters({"e": folder}, tmp_path / "out", method="task_arithmetic")


def test_a_layer_has_one_name_whatever_version_of_transformers_saved_it(family, tmp_path):
    """Under two names PEFT would load the factors of one alone."""
    _, experts = family
    folder = shutil.copytree(experts["e1"], tmp_path / "renamed")
    path = folder / "adapter_model.safetensors"
    old, new = f"{PREFIX}model.layers", f"{PREFIX}model.language_model.layers"
    save_file({name.replace(old, new): t for name, t in load_file(path).items()}, path)
    merged = []
    for name, second in (("plain", experts["e1"]), ("other", folder)):
        given = {"a": experts["e0"], "b": second}
        out = merge_adapters(given, tmp_path / name, method="task_arithmetic")
        merged.append(load_file(out / "adapter_model.safetensors"))
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())
