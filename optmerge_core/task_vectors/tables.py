"""Norms and magnitudes of task vectors as tables, and their inner products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from optmerge_core.checkpoints.names import layer_index, module_kind
from optmerge_core.task_vectors.stack import TaskVectors, derive_seed


def parameter_row(name: str, expert: str) -> dict[str, Any]:
    """The columns that say where a number belongs: parameter, layer, kind and expert."""
    place = {"parameter": name, "layer": layer_index(name), "kind": module_kind(name)}
    return place | {"expert": expert}


def layer_norms(task_vectors: TaskVectors) -> pd.DataFrame:
    """One row per parameter and expert: the Frobenius norms behind the paper's Fig. 2c.

    Columns: parameter, layer, kind, expert, size (number of entries), base_norm, norm,
    norm_per_parameter (norm / size, the paper's measure) and relative_norm (norm / base_norm).
    """
    rows = []
    for name in task_vectors:
        base = task_vectors.base[name]
        numbers = {"size": base.numel(), "base_norm": _norm(base)}
        for expert, task_vector in zip(task_vectors.expert_names, task_vectors[name], strict=True):
            rows.append(parameter_row(name, expert) | numbers | {"norm": _norm(task_vector)})
    table = pd.DataFrame(rows)
    table["norm_per_parameter"] = table["norm"] / table["size"]
    table["relative_norm"] = table["norm"] / table["base_norm"]
    return table


def magnitudes(task_vectors: TaskVectors, sample: int = 2000, seed: int = 0) -> pd.DataFrame:
    """A sample of |entries| of the task vectors, for distributions as in the paper's Fig. 2a.

    At most `sample` entries of each parameter, the same ones for all experts. Columns: parameter,
    layer, kind, expert, magnitude, weight (how many entries of the parameter one row stands for:
    weigh a histogram over several parameters by it).
    """
    frames = []
    for name in task_vectors:
        stack = task_vectors[name].flatten(1)
        size = stack.shape[1]
        drawn = min(sample, size)
        generator = np.random.default_rng(derive_seed(seed, name))
        index = torch.from_numpy(generator.choice(size, drawn, replace=False))
        values = stack[:, index.to(stack.device)].abs().cpu().numpy()
        for expert, row in zip(task_vectors.expert_names, values, strict=True):
            numbers = {"magnitude": row, "weight": size / drawn}
            frames.append(pd.DataFrame(parameter_row(name, expert) | numbers))
    return pd.concat(frames, ignore_index=True)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.to(torch.float32), dtype=torch.float64))


def inner(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The inner product of two merged task vectors (name -> tensor), as of two flat vectors."""
    return sum(float((first[n].double() * second[n].double()).sum()) for n in first)


def length(merged: Mapping[str, Tensor]) -> float:
    """The norm of a merged task vector, as of one flat vector."""
    return math.sqrt(inner(merged, merged))


def cosine(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The cosine of two merged task vectors."""
    return inner(first, second) / math.sqrt(inner(first, first) * inner(second, second))
