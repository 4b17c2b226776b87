"""The loop: what it draws at random, and what it says its work takes."""

import hashlib

import pytest
import torch
from cases import NAMES, moved, random

from optmerge_core.checkpoints.weights import as_weights
from optmerge_core.merging import loop
from optmerge_core.merging.loop import ParameterMerger, merge_tensors


def test_what_dare_drops_stays_that_of_the_first_version():
    """Of (seed, parameter, expert), whatever the order and the other experts: golden masks."""
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    base = {name: torch.zeros(4, 12), other: torch.zeros(64, 48)}

    def kept(expert, name, drop_rate):
        """Where the merge of this expert with one that is the base has kept an entry."""
        experts = {"base": base, expert: {n: torch.ones_like(t) for n, t in base.items()}}
        options = {"drop_rate": drop_rate}
        merged = merge_tensors(
            base, experts, [name], method="dare_task_arithmetic", method_options=options, seed=7
        )[name]
        assert set(merged.unique().tolist()) == {0, torch.tensor(1 / (1 - drop_rate)).item()}
        return merged.ne(0).int()

    masks = {
        "ocr": ["100010111100", "110001010100", "100110000011", "000110011000"],
        "chart": ["111110110100", "101000000011", "101110110110", "011101001001"],
    }
    for expert, rows in masks.items():
        assert ["".join(map(str, row)) for row in kept(expert, name, 0.5).tolist()] == rows
    large = {expert: kept(expert, other, 0.2).to(torch.uint8).numpy() for expert in masks}
    assert {expert: hashlib.sha256(mask).hexdigest() for expert, mask in large.items()} == {
        "ocr": "328c4bebf9c32a24dd84f0940309146693de8fe6787040f110680a97e6688532",
        "chart": "4add150e0deec7afe02ed01b17a62dc8bf0f2446cff3ee00a3d447aecc8fdd2d",
    }


@pytest.mark.parametrize(
    ("method", "options", "stacks"),
    [
        ("optmerge", {"steps": 1}, 30),
        ("dare_ties", {}, 30),
        ("ties", {}, 1),
        ("ties", {"rule": "mergekit"}, 1),
        ("weight_average", {}, 1),
    ],
)
def test_the_memory_of_a_parameter_bounds_how_many_merge(monkeypatch, method, options, stacks):
    """Ten float32 stacks of three experts; one tensor where blocks do; nothing for what is kept."""
    base = random(0)
    experts = {name: as_weights(moved(base, random(i, 0.05))) for i, name in enumerate("abc", 1)}
    asked = {}

    def recorded(work, items, device, memory):
        pieces = list(items)
        asked.update((piece[0], memory(piece)) for piece in pieces)
        return map(work, pieces)

    monkeypatch.setattr(loop, "in_order", recorded)
    merger = ParameterMerger(
        as_weights(base), experts, dict.fromkeys(NAMES[:2], NAMES[0]),
        dict.fromkeys(NAMES, torch.float32), method=method, options=options,
        scaling_coefficient=1.0, seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    results = list(merger.results(NAMES[:3]))
    assert [name for name, _, made in results if made] == NAMES[:2]
    assert asked == dict(zip(NAMES[:3], [4 * stacks * 48 * 32] * 2 + [0], strict=True))
