"""A full fine-tuning's update as a LoRA adapter of a given rank, and how much of it that keeps.

The best rank-r approximation of every matrix's task vector, U S Vᵀ cut after r singular values
(Eckart and Young), as B = U √S and A = √S Vᵀ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from optmerge_core.checkpoints.formats import ADAPTER_CONFIG, ADAPTER_NAME
from optmerge_core.checkpoints.names import PREFIX, closest_names
from optmerge_core.checkpoints.weights import Weights
from optmerge_core.checkpoints.writer import CheckpointWriter, check_output
from optmerge_core.errors import extra
from optmerge_core.merging.checks import check_apart, expert_folders, notice
from optmerge_core.merging.experts import open_models
from optmerge_core.methods.svd import truncated_svd
from optmerge_core.runtime import in_order
from optmerge_core.task_vectors.stack import TaskVectors

REPORT = "extraction.json"


def extract_adapter(
    base_model: str | Path,
    expert: str | Path,
    output_dir: str | Path,
    *,
    rank: int,
    family: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what `expert` learnt over `base_model` as a PEFT LoRA adapter of `rank`.

    Both are folders or hub ids of a full model. Of the parameters that merge the matrices get
    factors (float32, scale 1), named as in transformers' class. `extraction.json` has the share of
    the update's energy, its squared Frobenius norm, that is kept: of each matrix, of all of them,
    and of the whole update with what has no factors. Returns the folder.

    Raises `ValueError` for a rank below 1, an expert that is an adapter or changed no matrix, or a
    base that transformers has no class for; `CheckpointError` for files that do not fit together.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    check_output(output_dir, overwrite=overwrite)
    opened = open_models(base_model, {"expert": expert}, family=family)
    if opened.experts["expert"].changes is not None:
        raise ValueError(f"{expert} is an adapter already")
    check_apart(expert_folders(opened.experts | {"base": opened.base}), Path(output_dir))
    matrices = [name for name in opened.names if len(opened.base.shape(name)) == 2]
    modules = _modules(opened.base, matrices)
    task_vectors, energy = TaskVectors(opened.base, opened.experts, matrices), {}

    def factors(name: str) -> tuple[Tensor, Tensor, float, float]:
        """B (m, rank) and A (rank, n) of a matrix, its energy and what of it they keep."""
        tau = task_vectors[name][0]
        u, s, vh = truncated_svd(tau, rank)
        missing, root = rank - len(s), s.sqrt()
        b, a = pad(u * root, (0, missing)), pad(root[:, None] * vh, (0, 0, 0, missing))
        return b, a, tau.double().square().sum().item(), s.double().square().sum().item()

    progress = tqdm(matrices, desc="extracting", unit="matrix")
    with CheckpointWriter(output_dir, 2**63, overwrite=overwrite, single=ADAPTER_NAME) as writer:
        for name, (b, a, whole, kept) in zip(progress, in_order(factors, matrices), strict=True):
            if whole:
                energy[name] = whole, kept
                for factor, tensor in (("lora_A", a), ("lora_B", b)):
                    writer.add(f"{PREFIX}{modules[name]}.{factor}.weight", tensor.contiguous())
        if not energy:
            raise ValueError(f"{expert} has the base's matrices: there is nothing to extract")
        writer.digests()
        settings = _settings(base_model, rank, [modules[name] for name in energy])
        writer.write_text(ADAPTER_CONFIG, json.dumps(settings, indent=2) + "\n")
        report = _report(opened.base, opened.experts["expert"], matrices, energy)
        report = {"base_model": str(base_model), "expert": str(expert), "rank": rank} | report
        writer.write_text(REPORT, json.dumps(report, indent=2) + "\n")
    if report["kept_of_all"] < report["kept"] - 1e-3:
        notice(
            f"{1 - report['kept_of_all'] / report['kept']:.1%} of the update lies in parameters "
            "that no factors are made for (norms, biases, embeddings, towers, stacks of experts)"
        )
    return Path(output_dir)


def summary(folder: Path) -> str:
    """A sentence about an extracted adapter, of its report."""
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return (
        f"{folder}: an adapter of rank {report['rank']} for {len(report['matrices'])} matrices, "
        f"with {report['kept']:.1%} of their update's energy ({report['kept_of_all']:.1%} of all)"
    )


def _settings(base_model: str | Path, rank: int, modules: list[str]) -> dict[str, object]:
    """adapter_config.json."""
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "inference_mode": True,
        "target_modules": modules, "base_model_name_or_path": str(base_model),
    }  # fmt: skip


def _modules(base: Weights, names: list[str]) -> dict[str, str]:
    """Parameter -> its module in transformers' class, whose names may not be those of the files."""
    with extra("models"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    for kind in (AutoModelForImageTextToText, AutoModelForCausalLM):
        try:
            with torch.device("meta"):
                model = kind.from_config(AutoConfig.for_model(**base.config()))
        except ValueError:  # another kind of model
            continue
        parameters = dict(model.named_parameters())
        found = {name: closest_names(name, parameters) for name in names}
        return {name: _one(name, same).removesuffix(".weight") for name, same in found.items()}
    raise ValueError(
        f"{base.folder}: transformers has no class for model type "
        f"{base.config().get('model_type')!r}, so how an adapter must name its layers is not known"
    )


def _one(name: str, same: list[str]) -> str:
    if len(same) != 1:
        raise ValueError(f"{name}: found as {', '.join(same) or 'nothing'} in transformers' class")
    return same[0]


def _report(
    base: Weights, expert: Weights, matrices: list[str], energy: Mapping[str, tuple[float, float]]
) -> dict[str, object]:
    """Shares of energy; energy: matrix -> its own and what is kept of it."""
    whole, kept = (math.fsum(pair[i] for pair in energy.values()) for i in (0, 1))
    own, others = set(matrices), 0.0
    for name in tqdm([n for n in base if n not in own], desc="comparing the rest", leave=False):
        if name in expert and expert.shape(name) == base.shape(name):
            others += (expert[name].double() - base[name].double()).square().sum().item()
    return {
        "kept": kept / whole,
        "kept_of_all": kept / (whole + others),
        "matrices": {name: part / all_ for name, (all_, part) in energy.items()},
    }
