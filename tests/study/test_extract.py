"""A full fine-tuning's update as an adapter: what PEFT makes of it, and what is kept."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from optmerge_core import extract_adapter, open_checkpoint
from optmerge_core.__main__ import main
from optmerge_core.study.extract import REPORT

BASES = {family: f"data/benchmark/{family}/base" for family in ("internvl", "qwen2_vl")}
EXPERT = "data/benchmark/internvl/gentle/OCR"


def opened(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def report_of(folder):
    return json.loads((folder / REPORT).read_text())


def test_the_whole_rank_is_the_expert_itself(tmp_path):
    folder = extract_adapter(BASES["internvl"], EXPERT, tmp_path / "adapter", rank=128)
    merged = PeftModel.from_pretrained(opened(BASES["internvl"]), folder).merge_and_unload()
    expected = dict(opened(EXPERT).named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=2e-6, rtol=0)
    report = report_of(folder)
    assert report["kept"] == pytest.approx(1, abs=1e-6) == report["kept_of_all"]
    assert report["base_model"] == BASES["internvl"] and report["rank"] == 128


@pytest.mark.parametrize("rank", [1, 5])
def test_a_low_rank_is_the_best_there_is(tmp_path, rank):
    folder = extract_adapter(BASES["internvl"], EXPERT, tmp_path / "adapter", rank=rank)
    base, expert = open_checkpoint(BASES["internvl"]), open_checkpoint(EXPERT)
    factors, report = load_file(folder / "adapter_model.safetensors"), report_of(folder)
    assert {f.shape[0] for n, f in factors.items() if "lora_A" in n} == {rank}
    total = kept = 0.0
    for name, share in report["matrices"].items():
        tau = (expert[name].double() - base[name].double()).numpy()
        squares = np.linalg.svd(tau, compute_uv=False) ** 2
        assert share == pytest.approx(squares[:rank].sum() / squares.sum(), rel=1e-5)
        total, kept = total + squares.sum(), kept + squares[:rank].sum()
    assert report["kept"] == pytest.approx(kept / total, rel=1e-5)
    merged = PeftModel.from_pretrained(opened(BASES["internvl"]), folder).merge_and_unload()
    apart = sum(
        (x - y).double().square().sum().item()
        for x, y in zip(merged.parameters(), opened(EXPERT).parameters(), strict=True)
    )
    assert apart == pytest.approx(total - kept, rel=1e-3)


def test_names_are_those_of_the_class_where_files_have_others(tmp_path):
    """Qwen2-VL's files say model.layers, its class model.language_model.layers."""
    expert = tmp_path / "expert"
    shutil.copytree(BASES["qwen2_vl"], expert)
    weights = load_file(expert / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.0.mlp.up_proj.weight"))
    row = torch.zeros_like(weights[name])
    row[3] = 0.25
    norm = next(n for n in weights if n.endswith("layers.0.input_layernorm.weight"))
    changed = weights | {name: weights[name] + row, norm: weights[norm] + 0.5}
    save_file(changed, expert / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="of the update lies in parameters that no factors"):
        folder = extract_adapter(BASES["qwen2_vl"], expert, tmp_path / "adapter", rank=2)
    moved, of_norm = 0.25**2 * row.shape[1], 0.25 * weights[norm].numel()
    report = report_of(folder)
    assert list(report["matrices"]) == [name] and report["kept"] == pytest.approx(1, abs=1e-3)
    assert report["kept_of_all"] == pytest.approx(moved / (moved + of_norm), rel=1e-2)
    merged = PeftModel.from_pretrained(opened(BASES["qwen2_vl"]), folder).merge_and_unload()
    expected = dict(opened(expert).named_parameters())
    own = next(n for n in expected if n.endswith("layers.0.mlp.up_proj.weight"))
    torch.testing.assert_close(merged.get_parameter(own), expected[own], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("expert", "rank", "text"),
    [
        (EXPERT, 0, "rank is 0; it must be at least 1"),
        (BASES["internvl"], 2, "has the base's matrices: there is nothing to extract"),
    ],
)
def test_refusals_leave_nothing(tmp_path, expert, rank, text):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=text):
        warnings.simplefilter("ignore")
        extract_adapter(BASES["internvl"], expert, tmp_path / "adapter", rank=rank)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_one_already(tmp_path):
    with pytest.raises(ValueError, match="is an adapter already"):
        extract_adapter(
            BASES["qwen2_vl"], "data/benchmark/qwen2_vl/lora/OCR", tmp_path / "adapter", rank=2
        )


def test_command(tmp_path, capsys):
    words = ["extract", BASES["internvl"], EXPERT, "--rank", "4", "--output", str(tmp_path / "a")]
    assert main(words) == 0
    share = report_of(tmp_path / "a")["kept"]
    assert f"an adapter of rank 4 for 28 matrices, with {share:.1%}" in capsys.readouterr().out
    assert main(words) != 0 and "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
