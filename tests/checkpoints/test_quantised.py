"""Checkpoints in FP8 are read as what they stand for, to the bit; others are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from optmerge_core import merge
from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.checkpoints.quantised import dequantised

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
SHAPE, BLOCK = (5, 7), [2, 3]


def write(folder, tensors, settings=None):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "torch_dtype": "bfloat16"}
    config |= {"quantization_config": settings} if settings else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8(folder, seed=0, block=BLOCK):
    """A matrix whose blocks have scales of their own, and what it stands for, entry by entry."""
    generator = torch.Generator().manual_seed(seed)
    stored = (100 * torch.randn(SHAPE, generator=generator)).to(torch.float8_e4m3fn)
    rows, columns = (-(-n // b) for n, b in zip(SHAPE, block or SHAPE, strict=True))
    scales = torch.rand(rows, columns, generator=generator) / 1000 + 1e-4
    scales = scales if block else scales.flatten()
    meant = torch.empty(SHAPE, dtype=torch.float64)
    for i in range(SHAPE[0]):
        for j in range(SHAPE[1]):
            scale = scales[i // block[0], j // block[1]] if block else scales[0]
            meant[i, j] = stored[i, j].double() * scale.double()
    tensors = {UP: stored, f"{UP}_scale_inv": scales, NORM: torch.ones(7).bfloat16()}
    settings = {"quant_method": "fp8", "weight_block_size": block}
    return write(folder, tensors, settings), meant.float()


@pytest.mark.parametrize("block", [BLOCK, None])
def test_every_entry_is_number_times_scale(tmp_path, block):
    folder, meant = fp8(tmp_path / "fp8", block=block)
    opened = dequantised(open_checkpoint(folder))
    assert set(opened) == {UP, NORM} and opened.shape(UP) == SHAPE
    assert torch.equal(opened[UP], meant) and opened.dtype(UP) == torch.float32
    assert opened[NORM].dtype == torch.bfloat16 == opened.dtype(NORM)
    assert opened.config() == {"model_type": "llama", "torch_dtype": "float32"}


def test_base_and_expert_in_fp8_merge_into_a_model_that_is_not(tmp_path):
    (base, ours), (expert, theirs) = (fp8(tmp_path / f"{n}", seed=n) for n in (0, 1))
    merge(
        base, {"one": expert}, tmp_path / "out", method="task_arithmetic", scaling_coefficient=0.5
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged[UP], ours + 0.5 * (theirs - ours)) and set(merged) == {UP, NORM}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "float32"}


def test_an_expert_in_fp8_of_a_base_that_is_not(tmp_path):
    expert, theirs = fp8(tmp_path / "expert")
    whole = {UP: torch.zeros(SHAPE), NORM: torch.ones(7).bfloat16()}
    base = write(tmp_path / "base", whole)
    assert torch.equal(open_expert(expert, open_checkpoint(base))[UP], theirs)


EXPERTS = "model.layers.0.mlp.experts"
WIDE, GATE_UP, DOWN = (4, 6), f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
"""of two experts: inner and outer, which blocks of 2 × 3 divide"""


def mixture(seed, stacked):
    """Tensors of a mixture in FP8, in one stack or a matrix an expert, and what they stand for."""
    generator, stored, meant = torch.Generator().manual_seed(seed), {}, {}
    for kind, (rows, columns) in {"gate": WIDE, "up": WIDE, "down": WIDE[::-1]}.items():
        numbers = 100 * torch.randn(2, rows, columns, generator=generator)
        numbers = numbers.to(torch.float8_e4m3fn)
        scales = torch.rand(2, -(-rows // 2), -(-columns // 3), generator=generator) / 1000 + 1e-4
        per_entry = torch.empty(2, rows, columns)
        for i in range(rows):
            for j in range(columns):
                per_entry[:, i, j] = scales[:, i // 2, j // 3]
        meant[kind] = numbers.float() * per_entry
        for number in range(2):
            name = f"{EXPERTS}.{number}.{kind}_proj.weight"
            stored[name], stored[f"{name}_scale_inv"] = numbers[number], scales[number]
    fused = {GATE_UP: torch.cat([meant["gate"], meant["up"]], dim=1), DOWN: meant["down"]}
    if stacked:
        stored = {
            f"{EXPERTS}.{whole}{end}": torch.stack([
                torch.cat([stored[f"{EXPERTS}.{n}.{kind}_proj.weight{end}"] for kind in kinds])
                for n in range(2)
            ])
            for whole, kinds in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items()
            for end in ("", "_scale_inv")
        }  # fmt: skip
    return stored, fused


def write_shards(folder, tensors, settings):
    """Every number in one shard and its scales in another."""
    write(folder, {}, settings)
    (folder / "model.safetensors").unlink()
    weight_map = {n: f"model-0000{1 + n.endswith('inv')}-of-00002.safetensors" for n in tensors}
    for file in {*weight_map.values()}:
        save_file({n: tensors[n] for n in tensors if weight_map[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "qwen3_moe", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.filterwarnings("ignore:expert one has other names")
@pytest.mark.parametrize("stacked", [True, False])
def test_a_mixture_in_fp8_over_shards_merges_with_one_that_is_not(tmp_path, stacked):
    """Its matrices in one tensor or one by one; the other is a base as transformers 5 saves it."""
    settings = {"quant_method": "fp8", "weight_block_size": BLOCK}
    stored, meant = mixture(0, stacked)
    eight = write_shards(tmp_path / "fp8", stored, settings)
    other = {n: torch.ones_like(x) for n, x in meant.items()}
    plain = write(tmp_path / "plain", other)
    (plain / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    merge(plain, {"one": eight}, tmp_path / "out", method="task_arithmetic")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(merged, {n: 1 + (x - 1) for n, x in meant.items()})
    merge(
        eight, {"one": plain}, tmp_path / "half", method="task_arithmetic", dtype="bfloat16",
        scaling_coefficient=0.5,
    )  # fmt: skip
    half = {n: (x + 0.5 * (1 - x)).bfloat16() for n, x in meant.items()}
    merged = {n: x for n, x in open_checkpoint(tmp_path / "half").items()}
    if not stacked:  # the base's own layout is kept
        merged = {
            GATE_UP: torch.stack([
                torch.cat([merged[f"{EXPERTS}.{n}.{x}_proj.weight"] for x in ("gate", "up")])
                for n in range(2)
            ]),
            DOWN: torch.stack([merged[f"{EXPERTS}.{n}.down_proj.weight"] for n in range(2)]),
        }  # fmt: skip
    torch.testing.assert_close(merged, half)


def test_scales_of_another_shape_are_refused(tmp_path):
    folder, _ = fp8(tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}_scale_inv"] = tensors[f"{UP}_scale_inv"][:2].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"scale_inv has shape \(2, 3\) beside .*\(5, 7\)"):
        dequantised(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("bitsandbytes", r"\(FOLDER\)\.dequantize\(\)\.save_pretrained\(OTHER\), or better, take"),
        ("compressed-tensors", r"CompressedTensorsConfig\(dequantize=True\)\)\.save_pretrained"),
        ("mxfp4", r"Mxfp4Config\(dequantize=True\)\)\.save_pretrained\(OTHER\)"),
        ("gptq", "take the model that it was made from"),
    ],
)
def test_other_quantisations_are_refused_with_the_remedy(tmp_path, method, remedy):
    plain = {UP: torch.zeros(SHAPE), NORM: torch.ones(7)}
    base = write(tmp_path / "base", plain)
    quantised = write(tmp_path / "q", plain, {"quant_method": method})
    for given in ((base, quantised), (quantised, base)):
        with pytest.raises(CheckpointError, match=f"q: quantised by {method}; .*{remedy}"):
            merge(given[0], {"one": given[1]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
