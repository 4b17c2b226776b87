"""Norms and magnitudes as tables."""

import numpy as np
import pytest
import torch
from cases import NAME

from optmerge_core.task_vectors.stack import TaskVectors
from optmerge_core.task_vectors.tables import layer_norms, magnitudes


def test_layer_norms(toy):
    table = layer_norms(toy).set_index("expert")
    assert table.loc["b", ["parameter", "layer", "kind", "size"]].tolist() == [
        NAME, 1, "up_proj", 2,
    ]  # fmt: skip
    assert table.loc["b", "norm"] == 5 and table.loc["b", "base_norm"] == 5
    assert table.loc["b", "norm_per_parameter"] == 2.5
    assert table.loc["a", "relative_norm"] == pytest.approx(0.2)


def test_magnitudes_sample_the_same_entries_of_every_expert():
    base = {"w": torch.zeros(40, 50), "v": torch.zeros(3)}
    values = torch.randperm(2000).float().view(40, 50)
    experts = {"a": {"w": values, "v": torch.ones(3)}, "b": {"w": -values, "v": torch.ones(3)}}
    table = magnitudes(TaskVectors(base, experts, ["w", "v"]), sample=100, seed=1)
    drawn = {
        key: rows["magnitude"].to_numpy() for key, rows in table.groupby(["expert", "parameter"])
    }
    assert np.array_equal(drawn["a", "w"], drawn["b", "w"])
    assert len(set(drawn["a", "w"])) == 100 and len(drawn["a", "v"]) == 3
    assert table.groupby("expert")["weight"].sum().tolist() == [2003, 2003]
    again = magnitudes(TaskVectors(base, experts, ["v", "w"]), sample=100, seed=1)
    assert np.array_equal(
        again.query("expert == 'a' and parameter == 'w'")["magnitude"], drawn["a", "w"]
    )
