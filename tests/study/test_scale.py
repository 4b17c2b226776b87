"""What large models take: by hand, beside notebook 03's table, and beside the real classes."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from optmerge_core.merging.families import mergeable
from optmerge_core.study.scale import (
    DISK_PARAMETERS,
    MODELS,
    Model,
    Rates,
    bytes_read,
    hours,
    seconds_a_cost,
    table,
)

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"
SMALL = Model(layers=1, hidden=4, mlp=8, keys=2, vocabulary=10)


def rates() -> Rates:
    measured = [pd.read_csv(BENCHMARKS / f"{name}.csv") for name in ("scaling", "results")]
    return Rates.measured(*measured)


def test_a_small_model_by_hand():
    """Queries and outputs (4, 4), keys and values (2, 4), the MLP's three (8, 4) or (4, 8)."""
    (part,) = SMALL.parts
    assert part.cost == 2 * 4**3 + 2 * 2**2 * 4 + 3 * 4**2 * 8
    merging, ends = 2 * 16 + 2 * 8 + 3 * 32, 2 * 10 * 4
    assert part.bytes == SMALL.bytes == 2 * (merging + ends)
    assert bytes_read(SMALL.parameters, part) == SMALL.read() == 2 * (6 * merging + ends)
    assert SMALL.memory() == 40 * 5 * 32 + part.bytes
    assert hours(SMALL, 3, Rates(cost=1.0, byte=0.0)) == part.cost / 3600
    once = 2 * (6 * merging + ends) + 2 * (merging + ends)  # all read, then joined
    assert hours(SMALL, 1, Rates(cost=0.0, byte=1.0)) == once / 3600


def test_workers_share_the_parts_and_the_largest_is_one_s():
    found = table(MODELS, rates(), (1, 8, 64))
    for name, model in MODELS.items():
        one, eight, many = (found.loc[name, f"hours, {n}"] for n in (1, 8, 64))
        largest = max(part.cost for part in model.parts) * rates().cost / 3600
        assert largest < many < eight < one and one / 8 < eight and one / 64 < many
        assert found.loc[name, "parts"] == len(model.parts)


def test_the_estimate_is_that_of_notebook_03():
    stored = pd.read_csv(ROOT / "figures/internvl/tablexx_expected_cost.csv", index_col="model")
    for name, row in stored.iterrows():
        work = sum(part.cost for part in MODELS[name].parts)
        assert work * rates().cost / 2 / 3600 == pytest.approx(row["hours"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen2-VL-7B", 7.6), ("Qwen2.5-VL-32B", 32.8), ("Qwen2.5-VL-72B", 72.7),
        ("Qwen3-VL-235B-A22B", 235.1),
    ],
)  # fmt: skip
def test_as_large_as_they_are_said_to_be(name, billions):
    """Of the language models, which the makers count in billions of parameters."""
    assert MODELS[name].bytes / 2e9 == pytest.approx(billions, rel=3e-3)


def test_rates_are_those_of_the_measured_rows():
    wide = {"varied": "width", "case": "optmerge", "value": [8, 16], "ours (s)": [1.0, 4096.0]}
    assert seconds_a_cost(pd.DataFrame(wide)) == 4096 / (4 * 16**3)
    shape = {"layers": 16, "hidden": 896, "mlp": 4864, "keys": 128, "vocabulary": 151674}
    one_end = 896 * 151674  # models.py writes embeddings and no head
    assert Model(**shape).bytes == 2 * (DISK_PARAMETERS + one_end)


@pytest.mark.parametrize("name", ["Qwen2.5-VL-32B", "Qwen3-VL-235B-A22B"])
def test_a_layer_has_what_merges_in_the_real_class(name):
    """Its language model with one layer, without memory for it; all of its linear layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    model = MODELS[name]
    given = {
        "hidden_size": model.hidden, "intermediate_size": model.mlp, "num_hidden_layers": 1,
        "num_attention_heads": (model.queries or model.hidden) // 128, "head_dim": 128,
        "num_key_value_heads": model.keys // 128, "vocab_size": model.vocabulary,
        "tie_word_embeddings": False,
    }  # fmt: skip
    mixture = {"moe_intermediate_size": model.mlp, "num_experts": model.experts}
    with torch.device("meta"):
        if model.experts:
            real = Qwen3MoeForCausalLM(Qwen3MoeConfig(**given, **mixture))
        else:
            real = Qwen2ForCausalLM(Qwen2Config(**given))
    shapes = {key: tuple(tensor.shape) for key, tensor in real.state_dict().items()}
    merging = mergeable(shapes, "qwen3_moe" if model.experts else "qwen2")
    assert {key: shapes[key] for key in merging} == {
        f"model.layers.0.{key}": shape for key, shape in model.layer().items()
    }
    small = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 1)
    assert sum(map(math.prod, shapes.values())) - small == (
        sum(map(math.prod, model.layer().values())) + 2 * model.vocabulary * model.hidden
    )
