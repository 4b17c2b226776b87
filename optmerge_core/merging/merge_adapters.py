"""Merging LoRA adapters into one adapter, exactly, without ever making an outputs × inputs matrix.

`spaces` has the mathematics; here are files, one layer after the other.
"""

from __future__ import annotations

import json
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
from optmerge_core.merging.loop import generators
from optmerge_core.merging.report import MergeReport, Record, describe
from optmerge_core.merging.spaces import (
    Pair,
    Space,
    check_possible,
    merge_factors,
    product_norm,
)
from optmerge_core.runtime import Meter, in_order

BASE = "base_model_name_or_path"
HANDED_ON = ("task_type", "auto_mapping", BASE, "revision", "peft_version")
"""of the settings; all others are PEFT's defaults, which hold for any sum of factors"""


def merge_adapters(
    experts: Mapping[str, str | Path],
    output_dir: str | Path,
    *,
    method: str = "optmerge",
    method_options: Mapping[str, Any] | None = None,
    scaling_coefficient: float = 1.0,
    base_model: str | Path | None = None,
    space: str = "factors",
    rank: int | None = None,
    spectrum: str = "kept",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Merge PEFT LoRA adapters of one base model into one adapter that PEFT loads.

    experts: name -> adapter folder or hub id. Where they merge is `spaces.Space(space, rank,
    spectrum)`: "factors" is equal to `merge` of the same adapters up to rounding, for averages,
    tsv, iso_c, iso_cts, dc_merge, ssam, swudi, model_stock, nuslerp, and with SGD or ridge wudi and
    optmerge (preset lora unless told otherwise), SVC after any; "core" and "compressed" are for all
    but methods that need the base's weights. Others raise `ValueError` with why.
    base_model: folder or hub id, needed where an adapter began by changing it (PiSSA, OLoRA).
    seed: of what is drawn at random, with the layer's and the expert's name.
    Returns the folder: adapter_model.safetensors (float32) and adapter_config.json, scale 1, with
    merge_report.json and a model card.
    """
    meter, options = Meter(torch.device("cpu")), with_preset(method, method_options, "lora")
    check_request(experts, method, options, scaling_coefficient, "tensor", seed)
    place = Space(space, rank, spectrum)
    check_possible(method, options, place)
    check_output(output_dir, overwrite=overwrite)
    opened = _opened(experts, base_model)
    shapes = _common_shapes(opened, Path(output_dir))
    most, records = max(_rank(opened, m, place) for m in shapes), []

    def result(module: str) -> tuple[dict[str, Tensor], Record]:
        own, shape = _factors(opened, module), shapes[module]
        given = options | generators(opened, method, seed, module)
        b, a = merge_factors([*own.values()], method, given, scaling_coefficient, shape, place)
        norm = product_norm(b, a) / abs(scaling_coefficient or 1.0)
        return _padded(b, a, most) | _stored_head(opened, module), _record(module, shape, own, norm)

    progress = tqdm(shapes, desc=f"merging adapters ({method})", unit="module")
    with CheckpointWriter(output_dir, 2**63, overwrite=overwrite, single=ADAPTER_NAME) as writer:
        for module, (tensors, made) in zip(progress, in_order(result, shapes), strict=True):
            for name, tensor in tensors.items():
                writer.add(f"{PREFIX}{module}.{name}.weight", tensor.contiguous())
            records.append(made)
        digests, settings = writer.digests(), _settings(opened, most)
        writer.write_text(ADAPTER_CONFIG, json.dumps(settings, indent=2) + "\n")
        report = MergeReport(
            output_dir=str(output_dir), method=method, method_options=options,
            scaling_coefficient=scaling_coefficient, base_model=_base_model(settings),
            experts={n: describe(experts[n], factors.weights) for n, factors in opened.items()},
            parameters=records, weights=digests, space=space, rank=rank, spectrum=spectrum,
            seed=seed, **meter.read(),
        )  # fmt: skip
        writer.write_text("merge_report.json", report.to_json())
        writer.write_text("README.md", adapter_card(report))
    return Path(output_dir)


def _rank(opened: Mapping[str, Factors], module: str, space: Space) -> int:
    """Of a merged layer, from headers."""
    having = [factors for factors in opened.values() if module in factors]
    return space.rank_of(sum(f.rank(module) for f in having), having[0].shape(module))


def _factors(opened: Mapping[str, Factors], module: str) -> dict[str, Pair | None]:
    """Of each expert, None where it does not adapt the layer; `NotFinite` for NaN and Inf."""
    pairs = {name: factors.get(module) for name, factors in opened.items()}
    for name, pair in pairs.items():
        for factor in pair or ():
            check_finite_tensor(module, f"expert {name}", factor)
    return pairs


def _padded(b: Tensor, a: Tensor, rank: int) -> dict[str, Tensor]:
    """Factors of one rank for all layers, as PEFT wants them: smaller ones padded by 0."""
    missing = rank - len(a)
    return {"lora_A": pad(a, (0, 0, 0, missing)), "lora_B": pad(b, (0, missing))}


def _record(
    module: str, shape: tuple[int, ...], pairs: Mapping[str, Pair | None], norm: float
) -> Record:
    """The report's, of a layer; norm: of the merged task vector."""
    return Record(
        name=module, shape=list(shape), base_norm=None, merged_norm=norm,
        expert_norms={n: product_norm(*pair) if pair else 0.0 for n, pair in pairs.items()},
    )  # fmt: skip


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
