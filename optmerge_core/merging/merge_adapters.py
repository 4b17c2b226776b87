"""Merging LoRA adapters into one adapter, exactly, without ever making an outputs × inputs matrix.

With B = [B1 … BN] = Q R and Aᵀ = [A1ᵀ … ANᵀ] = P T, every task vector is τi = Q Ki Pᵀ, with a small
core Ki of at most Σ ri rows and columns. A method that only multiplies, adds and decomposes its
task vectors gives Q K Pᵀ, where K is what it gives for the cores: an adapter of rank ≤ Σ ri.
Methods that look at single entries (TIES, DARE, Adam) leave that span.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from optmerge_core.checkpoints import HUB_ID
from optmerge_core.checkpoints.adapters import Adapter
from optmerge_core.checkpoints.factors import Factors
from optmerge_core.checkpoints.formats import (
    ADAPTER_CONFIG,
    ADAPTER_NAME,
    CheckpointError,
    read_json,
)
from optmerge_core.checkpoints.names import PREFIX, TOWER, is_head, other_names
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.checkpoints.weights import InMemory, Weights, ties
from optmerge_core.checkpoints.writer import CheckpointWriter, check_output
from optmerge_core.merging.card import adapter_card
from optmerge_core.merging.checks import (
    check_apart,
    check_finite_tensor,
    check_request,
    expert_folders,
    notice,
    with_preset,
)
from optmerge_core.merging.licences import tell_licences
from optmerge_core.merging.report import MergeReport, Record, describe
from optmerge_core.methods import THEN
from optmerge_core.methods.optmerge import PRESETS
from optmerge_core.methods.registry import METHODS, calibrated
from optmerge_core.runtime import Meter, in_order

BASE = "base_model_name_or_path"
HANDED_ON = ("task_type", "auto_mapping", BASE, "revision", "peft_version")
"""of the settings; all others are PEFT's defaults, which hold for any sum of factors"""
ENTRYWISE = "works on single entries, which leaves the span of the factors"
IMPOSSIBLE = dict.fromkeys(("ties", "dare_task_arithmetic", "dare_ties"), ENTRYWISE) | {
    "aswudi": "counts directions that no expert uses"
}


def merge_adapters(
    experts: Mapping[str, str | Path],
    output_dir: str | Path,
    *,
    method: str = "optmerge",
    method_options: Mapping[str, Any] | None = None,
    scaling_coefficient: float = 1.0,
    base_model: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Merge PEFT LoRA adapters of one base model into one adapter that PEFT loads.

    experts: name -> adapter folder or hub id. Equal to `merge` of the same adapters up to rounding.
    Methods: weight_average, task_arithmetic, tsv, iso_c, swudi, and with SGD or ridge wudi and
    optmerge (preset lora unless told otherwise), SVC after any. Others raise `ValueError` with why.
    base_model: folder or hub id, needed where an adapter began by changing it (PiSSA, OLoRA).
    Returns the folder: adapter_model.safetensors (float32) and adapter_config.json, scale 1, with
    merge_report.json and a model card.
    """
    meter, options = Meter(torch.device("cpu")), with_preset(method, method_options, "lora")
    check_request(experts, method, options, scaling_coefficient, "tensor")
    check_possible(method, options)
    check_output(output_dir, overwrite=overwrite)
    opened = _opened(experts, base_model)
    shapes = _common_shapes(opened, Path(output_dir))
    ranks = {m: min(sum(f.rank(m) for f in opened.values() if m in f), *shapes[m]) for m in shapes}
    rank, records = max(ranks.values()), []

    def result(module: str) -> tuple[dict[str, Tensor], Record]:
        """Factors of one rank for all modules, as PEFT wants them: smaller ones padded by 0."""
        own = {name: factors.get(module) for name, factors in opened.items()}
        for name, factor in [(name, x) for name, pair in own.items() for x in pair or ()]:
            check_finite_tensor(module, f"expert {name}", factor)
        b, a = merge_factors([*own.values()], method, options, scaling_coefficient, shapes[module])
        made = Record(
            name=module, shape=list(shapes[module]), base_norm=None,
            merged_norm=product_norm(b, a) / abs(scaling_coefficient or 1.0),
            expert_norms={n: product_norm(*pair) if pair else 0.0 for n, pair in own.items()},
        )  # fmt: skip
        missing = rank - ranks[module]
        factors = {"lora_A": pad(a, (0, 0, 0, missing)), "lora_B": pad(b, (0, missing))}
        return factors | _stored_head(opened, module), made

    progress = tqdm(shapes, desc=f"merging adapters ({method})", unit="module")
    with CheckpointWriter(output_dir, 2**63, overwrite=overwrite, single=ADAPTER_NAME) as writer:
        for module, (tensors, made) in zip(progress, in_order(result, shapes), strict=True):
            for name, tensor in tensors.items():
                writer.add(f"{PREFIX}{module}.{name}.weight", tensor.contiguous())
            records.append(made)
        digests, settings = writer.digests(), _settings(opened, rank)
        writer.write_text(ADAPTER_CONFIG, json.dumps(settings, indent=2) + "\n")
        report = MergeReport(
            output_dir=str(output_dir), method=method, method_options=options,
            scaling_coefficient=scaling_coefficient, base_model=_base_model(settings),
            experts={n: describe(experts[n], factors.weights) for n, factors in opened.items()},
            parameters=records, weights=digests, **meter.read(),
        )  # fmt: skip
        writer.write_text("merge_report.json", report.to_json())
        writer.write_text("README.md", adapter_card(report))
    return Path(output_dir)


def _opened(experts: Mapping[str, str | Path], base_model: str | Path | None) -> dict[str, Factors]:
    """The adapters, a module named as in the first that has it (`names.other_names`)."""
    weights = {name: open_checkpoint(expert, adapter=True) for name, expert in experts.items()}
    base = None if base_model is None else open_checkpoint(base_model)
    opened = {n: Adapter(w, base).factors if base else Factors(w) for n, w in weights.items()}
    for name, factors in opened.items():
        if others := factors.others():
            raise CheckpointError(
                f"expert {name} has more than factors of linear layers ({'; '.join(others)}), "
                "which no merged adapter has; merge with the base model (merge)"
            )
    tell_licences(None, {name: factors.weights for name, factors in opened.items()})
    _tell_of_a_tied_head(opened, base)
    known: dict[str, None] = {}
    for factors in opened.values():
        same = other_names(known, factors)
        factors.rename(
            {m: x for m, x in same.items() if not TOWER.search(m) and not TOWER.search(x)}
        )
        known |= dict.fromkeys(factors)
    return opened


def _tell_of_a_tied_head(opened: Mapping[str, Factors], base: Weights | None) -> None:
    """Where the base is known, as `base` or as a folder that an adapter names."""
    named = [Path(f.settings.values.get(BASE) or "/", "config.json") for f in opened.values()]
    bases = [base or InMemory({}, read_json(path)) for path in named if base or path.is_file()]
    heads = [module for f in opened.values() for module in f if is_head(f"{module}.weight")]
    if heads and any(map(ties, bases)):
        notice(
            f"{heads[0]} is adapted, and the base ties it to its embeddings, which PEFT's "
            "merge_and_unload() would change too; for a whole model use merge(..., scope='all')"
        )


def _settings(opened: Mapping[str, Factors], rank: int) -> dict[str, Any]:
    """adapter_config.json: the first adapter's, with scale 1 and what is now of all modules."""
    modules = list(dict.fromkeys(module for factors in opened.values() for module in factors))
    first = next(iter(opened.values())).settings.values
    return {key: first.get(key) for key in HANDED_ON} | {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules,
        "inference_mode": True,
    }  # fmt: skip


def _stored_head(opened: Mapping[str, Factors], module: str) -> dict[str, Tensor]:
    """The base's weight, as PEFT saves it beside a head's factors: that of all who have it."""
    stored = {n: f.read(module, "base") for n, f in opened.items() if module in f}
    heads = [(name, tensor) for name, tensor in stored.items() if tensor is not None]
    for name, tensor in heads:
        if opened[name].settings.start or not torch.equal(tensor, heads[0][1]):
            raise CheckpointError(
                f"{module}: expert {name} has its base's weight beside the factors, unlike the "
                f"base's own or that of expert {heads[0][0]}; merge with the base model (merge)"
            )
    return {"base_layer": heads[0][1]} if heads else {}


def _base_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    location = str(settings.get(BASE) or "not named")
    revision = settings.get("revision") if HUB_ID.fullmatch(location) else None
    return {"location": location, "revision": revision, "sha256": {}}


def check_possible(method: str, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a method whose result is not an adapter."""
    reason = IMPOSSIBLE.get(method)
    if method in ("optmerge", "wudi"):
        preset = (
            PRESETS[options.get("preset", "lora")].optimizer if method == "optmerge" else "adam"
        )
        if options.get("optimizer", preset) == "adam":
            reason = f"with Adam {ENTRYWISE}; use optimizer='sgd' or 'ridge'"
    if options.get("null_directions") == "fill":
        reason = "with null_directions='fill' leaves the span of the factors"
    if reason:
        raise ValueError(
            f"{method} {reason}: its result is no adapter; use merge with a base model"
        )


def merge_factors(
    pairs: list[tuple[Tensor, Tensor] | None],
    method: str,
    options: Mapping[str, Any],
    scaling_coefficient: float,
    shape: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """One layer: factors (B, A) of every expert (None: not adapted) -> factors of the merged one.

    shape: (outputs, inputs). Returns (outputs, r), (r, inputs) float32, with r the smaller side of
    the cores; computed in float64.
    """
    given = [pair for pair in pairs if pair is not None]
    Q, R = torch.linalg.qr(torch.cat([b for b, _ in given], dim=1).double())
    P, T = torch.linalg.qr(torch.cat([a for _, a in given]).double().mT)
    cores, start = R.new_zeros(len(pairs), len(R), len(T)), 0
    for core, pair in zip(cores, pairs, strict=True):
        if pair is not None:
            end = start + len(pair[1])
            core.copy_(R[:, start:end] @ T[:, start:end].mT)
            start = end
    merged = scaling_coefficient * merge_cores(cores, method, options, shape)
    if len(R) < len(T):
        return Q.float(), (merged @ P.mT).float()
    return (Q @ merged).float(), P.mT.float()


def product_norm(b: Tensor, a: Tensor) -> float:
    """Frobenius norm of B A, of (outputs, r) and (r, inputs), in float64, without making it."""
    b, a = b.double(), a.double()
    return ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0).sqrt().item()


def merge_cores(
    cores: Tensor, method: str, options: Mapping[str, Any], shape: tuple[int, ...]
) -> Tensor:
    """METHODS[method] of the cores (experts, p, q), with its settings those of the whole `shape`.

    What a method takes from the shape (a share of the rank, a mean over all singular values or all
    entries) is translated; nothing else depends on it, and not what follows the method either.
    """
    options = dict(options)
    then = options.pop(THEN, None)
    return calibrated(then, method, _merged_cores(cores, method, options, shape), cores)


def _merged_cores(
    cores: Tensor, method: str, options: dict[str, Any], shape: tuple[int, ...]
) -> Tensor:
    """The same without what follows."""
    experts, small, whole = len(cores), min(cores.shape[1:]), min(shape)
    if method == "iso_c":
        merged = METHODS[method](cores, **options)
        over_all = options.get("mean_over", "all") == "all"  # singular values, most of them 0
        return merged * small / whole if over_all else merged
    if method == "tsv":  # it keeps small // experts directions of each: no fewer than there are
        missing = max(experts * min(whole // experts, small) - small, 0)
        padded = METHODS[method](pad(cores, (0, missing, 0, missing)), **options)
        return padded[: cores.shape[1], : cores.shape[2]]
    if method == "swudi":
        kept = math.ceil(options.get("rank_ratio", 0.65) * shape[1])
        options["rank_ratio"] = min(1.0, (kept - 0.5) / cores.shape[2])
    if method == "optmerge":
        ratio = options.get("rank_ratio", PRESETS[options["preset"]].rank_ratio)
        kept = max(whole // experts if ratio is None else int(ratio * whole), 1)
        options["rank_ratio"] = min(1.0, (kept + 0.5) / small)
    if options.get("optimizer") == "ridge":  # the penalty is in eigenvalues, averaged over all n
        shrink = options.get("shrink", PRESETS["lora"].shrink)
        options["shrink"] = shrink * cores.shape[2] / shape[1]
    if options.get("learning_rate_unit") == "rms":
        entries = cores[0].numel() / math.prod(shape)
        published = PRESETS[options.get("preset", "full")].learning_rate  # wudi's is full's
        options["learning_rate"] = options.get("learning_rate", published) * entries**0.5
    return METHODS[method](cores, **options)


def _common_shapes(opened: Mapping[str, Factors], output_dir: Path) -> dict[str, tuple[int, ...]]:
    """Module -> (outputs, inputs), of all that any adapter has; the output changes no adapter."""
    check_apart(expert_folders({n: factors.weights for n, factors in opened.items()}), output_dir)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, factors in opened.items():
        for module in factors:
            shape = shapes.setdefault(module, factors.shape(module))
            if shape != factors.shape(module):
                raise CheckpointError(
                    f"{module}: expert {name} has shape {factors.shape(module)}, another expert "
                    f"{shape}; adapters of one base model are needed"
                )
    return shapes
