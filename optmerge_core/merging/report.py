"""What a merge leaves behind besides weights: its report, what it read and cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from optmerge_core.checkpoints.formats import parse_hub_id
from optmerge_core.checkpoints.weights import Weights
from optmerge_core.merging.licences import BASE, Licence, read_licence


class Record(TypedDict):
    """What `merge_report.json` says of one merged parameter: Frobenius norms of weights."""

    name: str
    shape: list[int]
    base_norm: float | None
    """None where no base model was read"""
    merged_norm: float
    expert_norms: dict[str, float]


@dataclass(frozen=True)
class MergeReport:
    """What a merge read, did and cost; `merge_report.json` holds the same."""

    output_dir: str
    method: str
    method_options: dict[str, Any]
    scaling_coefficient: float
    base_model: dict[str, Any]
    """location, revision (hub commit or None), source, sha256 of each weight file, licence"""
    experts: dict[str, dict[str, Any]]
    """the same for each expert"""
    parameters: list[Record]
    """those that merged"""
    device: str
    seconds: float
    """from the call to the report, with all checks and hashes"""
    peak_memory_bytes: int
    """of the whole process, resident, while it merged"""
    peak_device_memory_bytes: int | None
    """allocated by torch on the CUDA device; None on the CPU"""
    parameters_kept: int = 0
    trim: str = "tensor"
    seed: int = 0
    dtype: str | None = None
    model_type: str | None = None
    family: str | None = None
    """as asked for; None where config.json's model type decided"""
    scope: str = "linear"
    router: str = "merge"
    processor: str = "base"
    """whose processor, tokenizer and chat template: "base", an expert's name or a folder"""
    chat_template: str | None = None
    """in the place of the processor's own"""
    space: str | None = None
    """of merged adapters: where they merged, with the rank asked for and the spectrum"""
    rank: int | None = None
    spectrum: str | None = None
    learnt: dict[str, Any] | None = None
    """from what data the method's options were learnt; None of a merge without data"""
    weights: dict[str, str] = field(default_factory=dict)
    """weight file of the output -> its SHA-256"""
    added_tokens: dict[str, dict[int, int]] | None = None
    """of an Omni model: modality -> its numbers of tokens that the base lacks -> their new ones"""
    plan: str | None = None
    """the key of the `MergePlan` whose parts were joined; None of a merge in one process"""
    workers: dict[str, list[int]] | None = None
    """machine:process -> the parts that it merged"""
    check: dict[str, Any] | None = None
    """whether the folder was seen to work, see `evaluation.check`; None before"""
    versions: dict[str, str] = field(
        default_factory=lambda: {name: version(name) for name in ("torch", "safetensors")}
    )

    def to_json(self) -> str:
        """Indented JSON of all fields; what JSON has no word for is written as text."""
        return json.dumps(asdict(self), indent=2, default=str) + "\n"

    def relative_norms(self) -> dict[str, float]:
        """Expert -> norm of its task vector over the base's, of all that merged."""
        base = math.hypot(*(record["base_norm"] or 0.0 for record in self.parameters))
        squares = {
            name: math.hypot(*(record["expert_norms"][name] for record in self.parameters))
            for name in self.experts
        }
        return {name: norm / base if base else math.nan for name, norm in squares.items()}

    def licences(self) -> dict[str, Licence]:
        """Of base model and experts, by their own cards."""
        inputs = {BASE: self.base_model} | self.experts
        return {name: item.get("licence", {}) for name, item in inputs.items()}

    def recipe(self) -> dict[str, Any]:
        """The recipe that makes this model again, hub ids with the commits that were read."""
        recipe = {
            "merge_method": self.method,
            "base_model": pinned(self.base_model),
            "models": [{"model": pinned(x), "name": name} for name, x in self.experts.items()],
            "parameters": {"lambda": self.scaling_coefficient},
            "method_options": {self.method: self.method_options},
            "trim": self.trim,
            "seed": self.seed,
        }
        defaults = {"dtype": None, "family": None, "scope": "linear", "router": "merge"}
        defaults |= {"processor": "base", "chat_template": None, "learnt": None}
        given = {key: getattr(self, key) for key in defaults}
        recipe |= {key: value for key, value in given.items() if value != defaults[key]}
        return dict(json.loads(json.dumps(recipe, default=str)))


def pinned(item: dict[str, Any]) -> str:
    """Where an input of a report is, a hub id with the commit that was read."""
    if item["revision"] is None:
        return str(item["location"])
    return f"{parse_hub_id(item['location'])[0]}@{item['revision']}"


def record_of(
    name: str, base: Tensor, stack: Tensor, merged: Tensor, expert_names: Iterable[str]
) -> Record:
    """The record, measured; stack: (experts, *shape)."""
    norms = dict(zip(expert_names, map(_norm, stack), strict=True))
    return Record(
        name=name, shape=list(merged.shape), base_norm=_norm_in_blocks(base),
        merged_norm=_norm(merged), expert_norms=norms,
    )  # fmt: skip


def joined(name: str, shape: Iterable[int], parts: list[Record]) -> Record:
    """The record of a parameter from those of its matrices."""
    norms = [(p["base_norm"] or 0.0, p["merged_norm"], *p["expert_norms"].values()) for p in parts]
    base_norm, merged_norm, *others = (math.hypot(*column) for column in zip(*norms, strict=True))
    return Record(
        name=name, shape=list(shape), base_norm=base_norm, merged_norm=merged_norm,
        expert_norms=dict(zip(parts[0]["expert_norms"], others, strict=True)),
    )  # fmt: skip


def _norm(tensor: Tensor) -> float:
    """Of rows in float32, of their norms in float64: as good, and ten times as fast."""
    rows = torch.linalg.vector_norm(tensor, dim=-1)
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64))


def _norm_in_blocks(tensor: Tensor) -> float:
    """The same of half precision, with no copy in float32 but of some rows that the cache holds."""
    blocks = torch.split(tensor, 256)
    rows = [torch.linalg.vector_norm(x.float(), dim=-1).reshape(-1) for x in blocks]
    return float(torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64))


def describe(location: str | Path, weights: Weights) -> dict[str, Any]:
    """What `merge_report.json` says of an input: where it is, commit, hashes of files, licence."""
    licence = read_licence(weights.folder)
    return {"location": str(location), **weights.provenance(), "licence": licence}


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of a model stored in another dtype."""
    return _replaced(config | {"dtype": dtype}, ("dtype", "torch_dtype"), dtype)


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a model whose head is stored apart."""
    return _replaced(config | {"tie_word_embeddings": False}, ("tie_word_embeddings",), False)


def _replaced(config: dict[str, Any], keys: Iterable[str], value: Any) -> dict[str, Any]:
    """Entries of these keys replaced at any depth."""
    inside = {key: _replaced(x, keys, value) for key, x in config.items() if isinstance(x, dict)}
    return config | inside | {key: value for key in keys if key in config}
