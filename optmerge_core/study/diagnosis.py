"""Will it merge? What can be measured of experts before a merge, in one streaming pass.

`diagnose` reads one parameter of all experts at a time. `findings.py` says what the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from optmerge_core.checkpoints.formats import dtype_name
from optmerge_core.checkpoints.names import TOWER, is_stack, layer_index, module_kind
from optmerge_core.checkpoints.weights import Weights
from optmerge_core.merging.checks import check_finite_stack
from optmerge_core.methods.svc import counted
from optmerge_core.methods.svd import truncated_svd
from optmerge_core.runtime import in_order
from optmerge_core.study.findings import ADAPTER, Diagnosis, find
from optmerge_core.task_vectors import spectra
from optmerge_core.task_vectors.stack import TaskVectors, derive_seed
from optmerge_core.task_vectors.tables import parameter_row

BLOCK = 1 << 16  # entries at a time: fits a core's cache, and float32 sums of it keep six digits
ROUNDING_SAMPLE = 1 << 16  # entries of a parameter whose unit in the last place is looked at
# Floating-point operations to spend on spectra: about 500 seconds of one core. It is enough for two
# thirds of a 1B model's layers with five experts; one layer of a 7B model takes four times that.
SPECTRA_BUDGET = 1e13
SUMS = ["base2", "norm2", "dot", "zeros", "stored", "noise2", "alone", "summed"]
RANKS = ["full_rank", "rank", "entropy_rank"]


def diagnose(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    names: Iterable[str],
    *,
    method: str = "optmerge",
    options: Mapping[str, Any] | None = None,
    scaling_coefficient: float = 1.0,
    budget: float = SPECTRA_BUDGET,
) -> Diagnosis:
    """Measure the experts (name -> `Weights` or state dict) of a base model.

    `names` are the parameters that merge. Norms, cosines, signs and rounding are of all of them,
    ranks and subspaces of as many evenly spaced layers as `budget` operations allow, at least one.
    Everything else is compared by value. The findings are for a merge by `method` with `options`
    and `scaling_coefficient`. Raises `ValueError` as `TaskVectors` does, and for NaN and Inf.
    """
    names = list(names)
    task_vectors = TaskVectors(base, experts, names)
    shapes = {name: task_vectors.base.shape(name) for name in names}
    sampled = _sample_layers(shapes, len(experts), budget)
    # An adapter is not stored in a dtype: its task vectors are products.
    stored = {
        expert: None if weights.changes is not None else weights.dtype(names[0])
        for expert, weights in task_vectors.experts.items()
    }

    def measure(name: str) -> dict[str, Any]:
        parts = []
        for number, matrix, stack in task_vectors.matrices(name):
            measured = _entries(stack, matrix)
            check_finite_stack(name, task_vectors, measured["gram"])
            rounding = [
                _rounding(name, matrix, task_vector, dtype)
                for task_vector, dtype in zip(stack, stored.values(), strict=True)
            ]
            measured["rounding"] = np.array(rounding)
            if number is None and stack.ndim == 3 and layer_index(name) in sampled:
                measured |= _spectra(stack, rounding)
            parts.append(measured)
        # Of a mixture's matrices the sums, as of one parameter.
        return parts[0] if len(parts) == 1 else {x: sum(p[x] for p in parts) for x in parts[0]}

    def memory(name: str) -> int:
        shape = shapes[name]
        return (4 * len(experts) + 40) * math.prod(shape[is_stack(name, shape) :])

    results = in_order(measure, names, memory=memory)
    progress = tqdm(names, desc="measuring", unit="parameter", leave=False)
    measured = dict(zip(progress, results, strict=True))
    outside = _compare_outside(task_vectors.base, task_vectors.experts, set(names))
    tables = _tables(measured, stored, outside, sampled)
    return replace(tables, findings=find(tables, method, options, scaling_coefficient))


def _sample_layers(shapes: Mapping[str, tuple[int, ...]], experts: int, budget: float) -> list[int]:
    """Evenly spaced layers whose Gram matrices and eigenvectors cost at most `budget` together."""
    costs: dict[int, float] = {}
    for name, shape in shapes.items():
        layer = layer_index(name)
        if len(shape) == 2 and layer is not None:
            small, large = sorted(shape)
            decomposed = 4 * small**2 * large + 10 * small**3  # the experts and their sum
            cost = (experts + 1) * decomposed + 2 * experts * small**2 * large
            costs[layer] = costs.get(layer, 0) + cost
    if not costs:
        return []
    count = min(len(costs), max(1, int(budget / max(costs.values()))))
    places = (np.arange(count) + 0.5) * len(costs) / count
    return [sorted(costs)[int(place)] for place in places]


def _entries(stack: Tensor, base: Tensor) -> dict[str, Any]:
    """Sums over all entries, block by block: (experts, *shape), (*shape) -> see below.

    gram (experts + 1)²: inner products of task vectors and, last, base; unchanged (experts,):
    entries that are 0; both, differ (experts, experts): entries nonzero in both, of opposite sign.
    """
    count = len(stack)
    gram = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    both, agree = torch.zeros(2, count, count, dtype=torch.float64)
    rows = zip(stack.flatten(1).split(BLOCK, 1), base.flatten().split(BLOCK), strict=True)
    for task_vectors, weights in rows:
        block = torch.cat([task_vectors, weights.float()[None]])
        gram += block @ block.mT
        signs = task_vectors.sign()  # sums of at most 2^16 ones are exact in float32
        agree += signs @ signs.mT
        both += signs.abs() @ signs.abs().mT
    return {
        "size": base.numel(),
        "gram": gram,
        "unchanged": base.numel() - both.diagonal(),
        "both": both,
        "differ": (both - agree) / 2,
    }


def _rounding(name: str, base: Tensor, task_vector: Tensor, dtype: torch.dtype | None) -> float:
    """Expected ‖rounding noise‖² of one task vector; NaN for an adapter, which is not rounded.

    Of the expert's own rounding: it was trained from the stored base. From a sample of entries.
    """
    if dtype is None:
        return math.nan
    if not task_vector.any():
        return 0.0
    weights, change = base.flatten(), task_vector.flatten()
    if len(weights) > ROUNDING_SAMPLE:
        generator = torch.Generator().manual_seed(derive_seed(0, name))
        drawn = torch.randint(len(weights), (ROUNDING_SAMPLE,), generator=generator)
        weights, change = weights[drawn], change[drawn]
    exact = weights.double()
    deviation = spectra.rounding_noise(exact, (exact + change).to(dtype))
    return deviation.square().mean().item() * base.numel()


def _spectra(stack: Tensor, rounding: list[float]) -> dict[str, Any]:
    """Ranks of all task vectors, the input directions that two experts share, and SVC's s.

    Of that, over the directions of the experts' sum, each expert's energy in them, `alone`, and as
    the sum counts it, once at least, `summed`: (experts,).
    """
    rows, columns = stack.shape[1:]
    ranks: list[dict[str, Any]] = []
    bases, count = [], max(1, min(rows, columns) // len(stack))
    for task_vector, noise in zip(stack, rounding, strict=True):
        _, values, directions = truncated_svd(task_vector)
        deviation = math.sqrt(np.nan_to_num(noise) / (rows * columns))
        floor = spectra.gavish_donoho_threshold(rows, columns, deviation)
        rank = int((values > max(floor, 1e-5 * values[0].item())).sum())
        entropy_rank = spectra.entropy_rank(values).item()
        ranks.append({"full_rank": len(values), "rank": rank, "entropy_rank": entropy_rank})
        bases.append(directions[:count])
    count = min([count, *(r["rank"] for r in ranks if r["rank"])])
    shared = spectra.basis_overlap(torch.stack([basis[:count] for basis in bases]))
    *_, energy, inner = counted(stack.sum(0), stack)
    sums = {"alone": energy.sum(1), "summed": torch.maximum(inner, energy).sum(1)}
    return {"ranks": ranks, "shared": shared.double(), "chance": count / columns} | sums


def _compare_outside(
    base: Weights, experts: Mapping[str, Weights], merging: set[str]
) -> list[dict[str, Any]]:
    """A row per expert and parameter outside the merge: did the expert change it, and how far?

    What an expert does not store (a tied lm_head, say) it did not change.
    """
    # An adapter has all of the base's parameters, and says which it adapts.
    owned = {n: x if x.changes is None else x.changes for n, x in experts.items()}
    outside = {name: None for has in owned.values() for name in has if name not in merging}

    def compare(name: str) -> list[dict[str, Any]]:
        ours, rows = base.get(name), []
        for expert in (expert for expert, has in owned.items() if name in has):
            theirs, norm2, base2 = experts[expert][name], math.nan, math.nan
            if ours is not None and ours.shape == theirs.shape:
                norm2, base2 = _squares(ours, theirs)
            row = {"expert": expert, "module": module_of(name), "changed": norm2 != 0}
            rows.append(row | {"norm2": norm2, "base2": base2})
        return rows

    progress = tqdm(outside, desc="comparing the rest", unit="parameter", leave=False)
    return [row for rows in in_order(compare, progress) for row in rows]


def _squares(base: Tensor, expert: Tensor) -> tuple[float, float]:
    """‖expert − base‖² and ‖base‖², block by block."""
    norm2 = base2 = 0.0
    for x, y in zip(base.flatten().split(BLOCK), expert.flatten().split(BLOCK), strict=True):
        norm2 += (y.double() - x.double()).square().sum().item()
        base2 += x.double().square().sum().item()
    return norm2, base2


def module_of(name: str) -> str:
    """The module that a parameter outside the merge belongs to, for a short table.

    A tower's or connector's own name, embed_tokens, lm_head; norms and biases of the language model
    by these words.
    """
    parts = name.split(".")
    owner = next((part for part in parts if TOWER.search(part)), None)
    if owner is None and "norm" in "".join(parts[-2:]):
        owner = "norms"
    return owner or ("biases" if parts[-1] == "bias" else module_kind(name))


def _tables(
    measured: Mapping[str, dict[str, Any]],
    stored: Mapping[str, torch.dtype | None],
    compared: list[dict[str, Any]],
    sampled: list[int],
) -> Diagnosis:
    """From sums per parameter to the tables of a `Diagnosis`."""
    rows = []
    for name, m in measured.items():
        for number, (expert, dtype) in enumerate(stored.items()):
            norm2 = m["gram"][number, number].item()
            counted = norm2 > 0 and dtype is not None
            row = parameter_row(name, expert) | {
                "size": m["size"],
                "base2": m["gram"][-1, -1].item(),
                "norm2": norm2,
                "dot": m["gram"][number, -1].item(),
                "zeros": m["unchanged"][number].item() if counted else math.nan,
                "stored": m["size"] if counted else math.nan,
                "noise2": m["rounding"][number],
                "alone": m["alone"][number].item() if "alone" in m else math.nan,
                "summed": m["summed"][number].item() if "summed" in m else math.nan,
            }
            rows.append(row | (m["ranks"][number] if "ranks" in m else dict.fromkeys(RANKS)))
    sums = pd.DataFrame(rows).astype(dict.fromkeys(RANKS, float))
    parameters = sums[["parameter", "layer", "kind", "expert", "size"]].join(
        [_quotients(sums), sums[RANKS]]
    )
    by_layer = sums.dropna(subset="layer").groupby(["layer", "expert"])[["norm2", "base2"]].sum()
    layers = (
        _quotient(by_layer["norm2"], by_layer["base2"], 0.5).unstack().reindex(columns=list(stored))
    )
    layers.index = layers.index.astype(int)
    by_expert = sums.groupby("expert", sort=False)
    table = _quotients(by_expert[SUMS].sum(min_count=1))
    table["changed"] = by_expert["norm2"].agg(lambda norms: (norms > 0).mean())
    table = table.join(by_expert[RANKS].mean())
    gram = sum(m["gram"] for m in measured.values())
    others = gram[:-1, :-1].sum() + gram.diagonal()[:-1] - 2 * gram[:-1, :-1].sum(0)
    table["others"] = (others.clamp(min=0) / gram[-1, -1]).sqrt().numpy()
    table["stored"] = [ADAPTER if d is None else dtype_name(d) for d in stored.values()]
    pairs, dropped = _pairs(measured, gram, list(stored)), _dropped(compared)
    return Diagnosis(parameters, layers, table, pairs, dropped, sampled)


def _quotients(sums: pd.DataFrame) -> pd.DataFrame:
    expert2 = sums["base2"] + 2 * sums["dot"] + sums["norm2"]
    table = {
        "base_norm": sums["base2"] ** 0.5,
        "norm": sums["norm2"] ** 0.5,
        "relative_norm": _quotient(sums["norm2"], sums["base2"], 0.5),
        "cosine_with_base": _quotient(
            sums["base2"] + sums["dot"], (sums["base2"] * expert2) ** 0.5
        ),
        "unchanged": _quotient(sums["zeros"], sums["stored"]),
        "rounding": _quotient(sums["noise2"], sums["norm2"]).clip(upper=1),
        "counted": _quotient(sums["summed"], sums["alone"]),
    }
    return pd.DataFrame(table)


def _quotient(numerator: pd.Series, divisor: pd.Series, power: float = 1) -> pd.Series:
    return (numerator / divisor.where(divisor > 0)) ** power


def _pairs(
    measured: Mapping[str, dict[str, Any]], gram: Tensor, experts: list[str]
) -> pd.DataFrame:
    both, differ = (sum(m[key] for m in measured.values()) for key in ("both", "differ"))
    spectral = [m for m in measured.values() if "shared" in m]
    shared = sum(m["shared"] for m in spectral) / len(spectral) if spectral else both * math.nan
    norms = gram.diagonal()[:-1].sqrt()
    first, second = np.triu_indices(len(experts), 1)
    table = {
        "cosine": gram[:-1, :-1] / (norms[:, None] * norms),
        "sign_conflict": differ / both,
        "shared_subspace": shared,
    }
    index = pd.MultiIndex.from_arrays(
        [[experts[i] for i in side] for side in (first, second)], names=["first", "second"]
    )
    pairs = pd.DataFrame({name: m[first, second].numpy() for name, m in table.items()}, index)
    pairs["chance"] = np.mean([m["chance"] for m in spectral]) if spectral else math.nan
    return pairs


def _dropped(compared: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(compared, columns=["expert", "module", "changed", "norm2", "base2"])
    groups = table.groupby(["expert", "module"], sort=False)
    sums = groups[["norm2", "base2"]].sum(skipna=False)
    rows = groups["changed"].agg(parameters="count", changed="sum")
    rows["relative_norm"] = _quotient(sums["norm2"], sums["base2"], 0.5)
    return rows[rows["changed"] > 0].reset_index()
