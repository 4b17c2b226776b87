"""What directions that no expert has do, on a tiny case, and on few questions of a study."""

import pandas as pd
import pytest
import torch
from cases import experts

from optmerge_core import load_recipe
from optmerge_core.benchmark.experiments import null_directions
from optmerge_core.benchmark.experiments.null_directions import STORED, VARIANTS, published
from optmerge_core.task_vectors.tables import cosine, inner


def test_whole_models_of_half_precision_have_noise_where_adapters_have_nothing():
    exact = experts((48, 32), rank=3, scale=1e-3, dtype=torch.float32)
    base = torch.randn(48, 32, generator=torch.Generator().manual_seed(1)) / 10
    assert published(base, exact, None) is exact
    ranks, errors = [], []
    for dtype in (torch.float16, torch.bfloat16):
        found = published(base, exact, dtype)
        assert torch.equal(
            (base.to(dtype).float() + found).to(dtype).float(), base.to(dtype) + found
        )
        ranks += torch.linalg.matrix_rank(found, rtol=1e-6).tolist()
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert torch.linalg.matrix_rank(exact, rtol=1e-6).tolist() == [3, 3, 3]
    assert ranks == [32] * 6
    assert errors[1] / errors[0] == pytest.approx(8, rel=0.2)  # three bits fewer


def test_norms_and_cosines_by_hand():
    reference = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    found = {"a": torch.tensor([0.0, 6.0]), "b": torch.tensor([[8.0]])}
    assert (inner(found, found) / inner(reference, reference)) ** 0.5 == pytest.approx(2)
    assert cosine(found, reference) == pytest.approx(32 / 50)


def test_every_variant_is_scored(tmp_path, monkeypatch):
    study = load_recipe("data/recipes/qwen2_vl.yaml")
    study = study.model_copy(update={"scaling_coefficients": [0.5, 40.0]})
    monkeypatch.setattr(null_directions, "load_recipe", lambda _: study)
    null_directions.main("", tmp_path, count=4)
    table = pd.read_csv(tmp_path / "null_directions.csv")
    assert table["stored"].iloc[0] == "base_model" and table["scaling_coefficient"].iloc[0] == 0
    rows = table.iloc[1:].set_index(["stored", "variant", "scaling_coefficient"])
    assert list(rows.index) == [(s, v, c) for s in STORED for v in VARIANTS for c in (0.5, 40)]
    assert table["accuracy"].between(0, 100).all()
    assert rows["accuracy"].xs(40, level=2).max() < rows["accuracy"].xs(0.5, level=2).min()
    one = rows.xs(0.5, level=2)
    assert one.loc["adapter"].loc[["tsv", "iso_c"], ["norm", "cosine"]].eq(1).all(axis=None)
    exact, whole = (one.loc[stored, "cosine"] for stored in ("adapter", "bfloat16"))
    assert exact["iso_c, filled"] < 0.7 and whole["iso_c"] < 0.7  # noise does what filling does
    norms = one.loc["adapter", "norm"]
    assert norms["iso_c, filled, mean over nonzero"] > norms["iso_c, mean over nonzero"] > 2
