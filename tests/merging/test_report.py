"""The model card makes its model again, says where it came from, and its code runs."""

import json
import math
import re

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from optmerge_core import load_recipe, merge, merge_adapters, open_checkpoint
from optmerge_core.merging.card import model_card
from optmerge_core.merging.report import MergeReport

NAME = "language_model.model.layers.{}.mlp.up_proj.weight"


def block(card, language):
    return card.split(f"```{language}\n")[1].split("```")[0]


def table(card, heading):
    """The rows of the table under a heading, split into cells."""
    lines = card.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [line[2:-2].split(" | ") for line in lines if line.startswith("|")]
    return rows[2:]


def report(**changes):
    """A report as `merge` would give for two inputs from the hub."""
    inputs = {"location": "owner/base", "revision": "c0ffee", "sha256": {"model.safetensors": "ab"}}
    records = [
        {"name": NAME.format(layer), "shape": [4, 3], "base_norm": 10.0, "merged_norm": 3.0,
         "expert_norms": {"ocr": 2.0}}
        for layer in (0, 10, 2)
    ]  # fmt: skip
    fields = {
        "output_dir": "merged", "method": "tsv", "method_options": {}, "scaling_coefficient": 0.5,
        "trim": "tensor", "seed": 0, "device": "cpu", "dtype": None, "model_type": "qwen2_vl",
        "base_model": inputs,
        "experts": {"ocr": {"location": "owner/ocr@main", "revision": "f00d", "sha256": {}}},
        "parameters": records, "parameters_kept": 5, "seconds": 1.0, "peak_memory_bytes": 1,
        "peak_device_memory_bytes": None, "versions": {},
    }  # fmt: skip
    return MergeReport(**fields | changes)


def test_the_cards_recipe_makes_the_same_model_again(tiny, tmp_path):
    settings = {"method": "dare_ties", "method_options": {"density": 0.5, "drop_rate": 0.3}}
    merge(
        tiny.base, tiny.experts, tmp_path / "one", scaling_coefficient=0.4, seed=7, family="llava",
        dtype="bfloat16", **settings,
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(block((tmp_path / "one/README.md").read_text(), "yaml"))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.family == "llava" and recipe.dtype == "bfloat16"
    again = merge(
        recipe.base_model, recipe.experts, tmp_path / "two", method=recipe.merge_method,
        method_options=recipe.options(), scaling_coefficient=recipe.scaling_coefficient,
        seed=recipe.seed, trim=recipe.trim, dtype=recipe.dtype, family=recipe.family,
    )  # fmt: skip
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one) and len(one) == len(two)
    assert again.method == "dare_ties"


def test_the_load_snippet_runs(tiny, tmp_path):
    merge(tiny.base, tiny.experts, tmp_path / "out", method="ties")
    code = block((tmp_path / "out/README.md").read_text(), "python")
    namespace = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "out")), namespace)
    assert type(namespace["model"]).__name__ == "InternVLForConditionalGeneration"
    assert namespace["tokenizer"].decode([5]) == "red"


def test_inputs_layers_and_front_matter(tiny, tmp_path):
    done = merge(tiny.base, tiny.experts, tmp_path / "out", method="ties", scaling_coefficient=0.7)
    card = (tmp_path / "out" / "README.md").read_text()
    front_matter = yaml.safe_load(card.split("---\n")[1])
    assert front_matter == {"library_name": "transformers", "tags": ["merge", "optmerge"]}

    rows = table(card, "Inputs")
    digests = open_checkpoint(tiny.base).sha256()
    assert [row[-2:] for row in rows[: len(digests)]] == [list(x) for x in digests.items()]
    assert [row[0] for row in rows if row[0]] == ["base model", *tiny.experts]
    assert rows[0][1:3] == [f"`{tiny.base}`", "–"]

    base = open_checkpoint(tiny.base)
    layer = [record for record in done.parameters if ".layers.1." in record["name"]]
    before = torch.cat([base[record["name"]].flatten() for record in layer]).double()
    merged = open_checkpoint(tmp_path / "out")
    after = torch.cat([merged[record["name"]].flatten() for record in layer]).double()
    norm = math.hypot(*(record["base_norm"] for record in layer))
    assert norm == pytest.approx(before.norm().item(), rel=1e-6)
    number, parameters, change, _ = table(card, "Layers")[1]
    assert (number, parameters) == ("1", "7")
    moved = 100 * ((after - before).norm() / before.norm()).item()
    assert float(change.rstrip("%")) == pytest.approx(moved, rel=0.01)


def test_hub_inputs_are_pinned_and_listed(tmp_path):
    card = model_card(report(), {"architectures": ["Qwen2VLForConditionalGeneration"]}, tmp_path)
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "transformers",
        "tags": ["merge", "optmerge"],
        "base_model": ["owner/base", "owner/ocr"],
        "base_model_relation": "merge",
    }
    recipe = yaml.safe_load(block(card, "yaml"))
    assert recipe["base_model"] == "owner/base@c0ffee"
    assert recipe["models"] == [{"model": "owner/ocr@f00d", "name": "ocr"}]
    assert "scope" not in recipe and "--stream" not in card
    assert table(card, "Inputs")[1] == ["ocr", "`owner/ocr@main`", "f00d", "–", "–"]
    assert [row[0] for row in table(card, "Layers")] == ["0", "2", "10"]
    assert table(card, "Layers")[0][2:] == ["15.00%", "1.50"]


def test_streamed_inputs_keep_their_address_and_what_identifies_them():
    base = {
        "location": "https://example.org/base", "revision": None,
        "sha256": {"model.safetensors": 'etag "1|2", 10 bytes'},
    }  # fmt: skip
    card = model_card(report(base_model=base, scope="all"), {})
    recipe = yaml.safe_load(block(card, "yaml"))
    assert recipe["base_model"] == "https://example.org/base" and recipe["scope"] == "all"
    assert "--output merged --stream`" in card
    assert r'etag "1\|2", 10 bytes' in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == ["owner/ocr"]


def test_all_parts_of_a_model_have_their_rows():
    records = [
        {"name": name, "shape": [2], "base_norm": base, "merged_norm": norm,
         "expert_norms": {"ocr": norm}}
        for name, base, norm in (
            ("lm_head.weight", 1.0, 1.0), ("visual.blocks.0.w", 3.0, 3.0),
            ("visual.blocks.0.v", 4.0, 4.0), ("model.layers.0.w", 0.0, 0.0),
        )
    ]  # fmt: skip
    rows = table(model_card(report(parameters=records), {}), "Layers")
    assert rows == [
        ["model.layers.0", "1", "–", "–"],
        ["visual.blocks.0", "2", "50.00%", "1.00"],
        ["others", "1", "50.00%", "1.00"],
    ]


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, None, "AutoTokenizer, LlamaForCausalLM"),
        ({"architectures": ["Qwen2VLModel"]}, None, "AutoProcessor, Qwen2VLModel"),
        ({"architectures": ["Qwen2VLModel"]}, {}, "AutoTokenizer, Qwen2VLModel"),
        (
            {"architectures": ["Qwen2VLModel"]},
            {"preprocessor_config.json": {"processor_class": "Qwen2VLProcessor"}},
            "AutoProcessor, Qwen2VLModel",
        ),
        ({}, {"processor_config.json": {}}, "AutoModel, AutoProcessor"),
        ({"architectures": "odd", "auto_map": ["odd"]}, {}, "AutoModel, AutoTokenizer"),
    ],
)
def test_load_snippet_fits_the_model(tmp_path, config, files, expected):
    for name, content in (files or {}).items():
        (tmp_path / name).write_text(json.dumps(content))
    folder = None if files is None else tmp_path
    code = block(model_card(report(), config, folder), "python")
    assert code.splitlines()[0] == f"from transformers import {expected}"
    assert "trust_remote_code" not in code
    compile(code, "card", "exec")


@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json"])
def test_a_processor_that_transformers_lacks_is_named(tmp_path, file):
    (tmp_path / file).write_text('{"processor_class": "NowhereProcessor"}')
    code = block(model_card(report(), {"architectures": ["Qwen2VLModel"]}, tmp_path), "python")
    lines = code.splitlines()
    assert lines[0] == "from transformers import AutoProcessor, Qwen2VLModel"
    assert lines[1].startswith("# first import the package that has NowhereProcessor")
    compile(code, "card", "exec")


def test_remote_code_is_named_and_asked_for(tmp_path):
    config = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "a.B", "AutoModel": "c.D", "AutoModelForCausalLM": "c.D"},
    }
    code = block(model_card(report(), config, tmp_path), "python")
    assert code.startswith("from transformers import AutoModel, AutoTokenizer\n")
    assert len(re.findall("trust_remote_code=True", code)) == 2 and "read them first" in code
    compile(code, "card", "exec")


def test_merged_adapters_get_a_report_and_a_card(tmp_path):
    folders = {}
    for seed, name in enumerate(("ocr", "vqa")):
        folders[name] = adapter(tmp_path / name, seed)
    out = merge_adapters(
        folders, tmp_path / "out", method="task_arithmetic", scaling_coefficient=0.5
    )
    done = json.loads((out / "merge_report.json").read_text())
    assert (
        done["experts"]["ocr"]["sha256"] == open_checkpoint(tmp_path / "ocr", adapter=True).sha256()
    )
    taus = [scaled_product(folder) for folder in folders.values()]
    (record,) = done["parameters"]
    assert record["expert_norms"]["vqa"] == pytest.approx(taus[1].norm().item(), rel=1e-5)
    assert record["merged_norm"] == pytest.approx(sum(taus).norm().item(), rel=1e-5)
    assert record["shape"] == [6, 5] and record["base_norm"] is None

    card = (out / "README.md").read_text()
    front_matter = yaml.safe_load(card.split("---\n")[1])
    assert front_matter["library_name"] == "peft" and front_matter["base_model"] == ["owner/base"]
    mean = (taus[0].norm() + taus[1].norm()).item() / 2
    assert table(card, "Layers") == [["3", "1", "–", f"{sum(taus).norm().item() / mean:.2f}"]]
    code = block(card, "python").replace('"merged"', repr(str(tmp_path / "again")))
    exec(code)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (out / weights).read_bytes()
    assert 'PeftModel.from_pretrained(model, "path/to/this/folder")' in card


def test_a_merged_adapters_card_makes_it_again_in_its_space(tmp_path):
    folders = {name: adapter(tmp_path / name, seed) for seed, name in enumerate(("ocr", "vqa"))}
    for space, told in (
        ({"space": "core", "spectrum": "even", "seed": 3}, "Core Space, with an even spectrum; sc"),
        ({"space": "compressed", "rank": 1}, "layers, each compressed to rank 1 and merged there;"),
    ):
        out = merge_adapters(folders, tmp_path / space["space"], method="dare_ties", **space)
        done = json.loads((out / "merge_report.json").read_text())
        assert {key: done[key] for key in space} == space
        card = (out / "README.md").read_text()
        assert told in card
        again = tmp_path / f"{space['space']} again"
        exec(block(card, "python").replace('"merged"', repr(str(again))))
        weights = "adapter_model.safetensors"
        assert (again / weights).read_bytes() == (out / weights).read_bytes()


def adapter(folder, seed):
    """A LoRA adapter of one layer, 5 inputs and 6 outputs, rank 2, scale 4 / 2."""
    generator = torch.Generator().manual_seed(seed)
    name = "base_model.model.model.layers.3.mlp.up_proj.lora_{}.weight"
    folder.mkdir()
    save_file(
        {
            name.format("A"): torch.randn(2, 5, generator=generator),
            name.format("B"): torch.randn(6, 2, generator=generator),
        },
        folder / "adapter_model.safetensors",
    )
    LoraConfig(
        r=2, lora_alpha=4, target_modules=["up_proj"], base_model_name_or_path="owner/base"
    ).save_pretrained(folder)
    return folder


def scaled_product(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[key] for key in sorted(tensors))
    return 2 * b @ a
