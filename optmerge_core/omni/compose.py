"""Omni models (Section 5): language models merged, tokenizers reconciled, towers copied."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optmerge_core.checkpoints.formats import dtype_name, side_files
from optmerge_core.checkpoints.names import EMBEDDINGS, HEAD, routers
from optmerge_core.checkpoints.weights import Weights
from optmerge_core.checkpoints.writer import CheckpointWriter, check_output
from optmerge_core.merging.card import omni_card
from optmerge_core.merging.checks import (
    check_finite_tensor,
    check_folders,
    check_request,
    check_settings,
    with_preset,
)
from optmerge_core.merging.experts import Opened
from optmerge_core.merging.loop import ParameterMerger, trim_thresholds_over_model
from optmerge_core.merging.report import MergeReport, describe, with_dtype
from optmerge_core.omni.model import OmniConfig, OmniForConditionalGeneration
from optmerge_core.omni.specialists import (
    Specialist,
    load_tokenizer,
    open_language_models,
)
from optmerge_core.omni.tokens import check_tokens, reconcile, renumbered, with_added_rows
from optmerge_core.runtime import Meter, parse_device, parse_dtype
from optmerge_core.task_vectors.stack import TaskVectors

PACKAGES = ("torch", "transformers", "safetensors")
Ids = Mapping[str, Mapping[int, int]]
"""Modality -> its numbers of tokens that the base lacks -> their new ones."""


def compose(
    base_language_model: str | Path,
    specialists: Mapping[str, str | Path | PreTrainedModel],
    output_dir: str | Path,
    *,
    method: str = "optmerge",
    method_options: Mapping[str, Any] | None = None,
    scaling_coefficient: float = 1.0,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    trim: str = "tensor",
    seed: int = 0,
    overwrite: bool = False,
    family: str | None = None,
    scope: str = "linear",
    router: str = "merge",
    max_shard_size: int | str = "400MB",
) -> Path:
    """Merge the specialists' language models and write one Omni model with all their towers.

    base_language_model: folder or hub id of the language model that all specialists started from;
    specialists: modality -> folder, hub id, PEFT adapter or loaded model. The linear layers become
    base + scaling_coefficient * METHODS[method](task vectors), OptMerge with its preset `modality`
    unless told otherwise; embeddings, norms and lm_head become the specialists' mean, or with
    `scope="all"` merge as well. `dtype`, of towers too, `trim`, `family` and `router` are those of
    `merge`. Added tokens get numbers after the base's. `output_dir` opens with
    `OmniForConditionalGeneration.from_pretrained`; `specialists/<modality>` has their side files.

    Loop, checks, report and card are those of `merge`, but no `MergePlan` is made: specialists and
    their towers may come from memory, and the output has names and rows that the base has not.
    Raises `ValueError` (`CheckpointError` for files), and nothing is left at `output_dir`.
    """
    chosen, stored = parse_device(device), parse_dtype(dtype)
    meter, options = Meter(chosen), with_preset(method, method_options, "modality")
    check_request(specialists, method, options, scaling_coefficient, trim, seed, family)
    check_output(output_dir, overwrite=overwrite)
    place = {"family": family, "scope": scope, "router": router}
    models, opened = open_language_models(base_language_model, specialists, **place)
    check_folders(models.base, models.experts, Path(output_dir))
    tokenizer = load_tokenizer(models.base.folder)
    ids = reconcile(tokenizer, opened) if tokenizer else {modality: {} for modality in opened}
    check_tokens(opened, ids)
    settings = {"method": method, "scaling_coefficient": scaling_coefficient, "seed": seed}
    merger = _merger(models, stored, chosen, trim, router, options=options, **settings)
    with CheckpointWriter(output_dir, max_shard_size, overwrite=overwrite) as writer:
        records = _write_weights(writer, merger, opened, ids, stored)
        weights = writer.digests()
        _write_side_files(writer, models.base, opened, ids, tokenizer, stored)
        report = MergeReport(
            output_dir=str(output_dir), method_options=options, trim=trim,
            dtype=stored and dtype_name(stored), model_type=models.model_type,
            base_model=describe(base_language_model, models.base),
            experts={m: _describe(specialists[m], s) for m, s in opened.items()},
            parameters=records, parameters_kept=len(models.base) - len(records), weights=weights,
            added_tokens=ids, versions={package: version(package) for package in PACKAGES},
            **settings, **place, **meter.read(),
        )  # fmt: skip
        writer.write_text("merge_report.json", report.to_json())
        writer.write_text("README.md", omni_card(report))
    return Path(output_dir)


def _merger(
    models: Opened,
    dtype: torch.dtype | None,
    device: torch.device,
    trim: str,
    router: str,
    **settings: Any,
) -> ParameterMerger:
    """Of the language models: what does not merge is averaged, but for a router that is kept."""
    base, thresholds = models.base, None
    kept = routers(base) if router == "base" else set()
    chosen = (settings["method"], settings["options"])
    check_settings(*chosen, base, models.names, len(models.experts))
    if trim == "model":
        task_vectors = TaskVectors(base, models.experts, models.names, device)
        thresholds = trim_thresholds_over_model(task_vectors, *chosen, settings["seed"])
    return ParameterMerger(
        base,
        models.experts,
        {name: name for name in base if name not in kept},
        {name: dtype or base.dtype(name) for name in base},
        device=device,
        thresholds=thresholds,
        averaged=frozenset(base) - frozenset(models.names),
        **settings,
    )


def _write_weights(
    writer: CheckpointWriter,
    merger: ParameterMerger,
    opened: Mapping[str, Specialist],
    ids: Ids,
    dtype: torch.dtype | None,
) -> list[dict[str, Any]]:
    """The language model with the rows of all added tokens, then the towers; returns records."""
    records, base = [], merger.base
    for name, tensor, made in tqdm(merger.results(base), "merging", len(base), unit="parameter"):
        records += [made] if made else []
        if name in (EMBEDDINGS, HEAD):
            tensor = with_added_rows(name, tensor, opened, ids)
        bare = name.removeprefix("model.")
        writer.add(HEAD if name == HEAD else f"language_model.{bare}", tensor)
    for name, tensor in _towers(opened):
        writer.add(name, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor)
    return records


def _towers(opened: Mapping[str, Specialist]) -> Iterator[tuple[str, Tensor]]:
    """All that is no language model, under the names the Omni model has for it."""
    for modality, specialist in opened.items():
        for own, tensor in specialist.towers.items():
            name = f"specialists.{modality}.{own}"
            check_finite_tensor(name, "its specialist", tensor)
            yield name, tensor


def _write_side_files(
    writer: CheckpointWriter,
    base: Weights,
    opened: Mapping[str, Specialist],
    ids: Ids,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
) -> None:
    """config.json, the common tokenizer, and each specialist's own side files."""
    text = base.config()
    added = (1 + new for own in ids.values() for new in own.values())
    text |= {"vocab_size": max(base.shape(EMBEDDINGS)[0], *added, 0)}
    config = OmniConfig(
        text_config=text,
        specialists={m: renumbered(s.config, ids[m]) for m, s in opened.items()},
        dtype=text.get("dtype") or text.get("torch_dtype"),
        architectures=[OmniForConditionalGeneration.__name__],
    ).to_json_string()
    if dtype is not None:
        content = with_dtype(json.loads(config), dtype_name(dtype))
        config = json.dumps(content, indent=2) + "\n"
    writer.write_text("config.json", config)
    if tokenizer:
        tokenizer.save_pretrained(writer.folder)
    for modality, specialist in opened.items():
        target = writer.folder / "specialists" / modality
        target.mkdir(parents=True)
        for read in reversed(specialist.read):  # an adapter's own tokenizer over its base's
            for path in side_files(read.folder):
                (target / path.name).write_bytes(path.read_bytes())


def _describe(source: str | Path | PreTrainedModel, specialist: Specialist) -> dict[str, Any]:
    """As `describe`; of an adapter with its base's hashes, of a loaded model its class alone."""
    if not specialist.read:
        return {"location": type(source).__name__, "revision": None, "source": None, "sha256": {}}
    opened, *base = [describe(source, checkpoint) for checkpoint in specialist.read]
    licence = next((x["licence"] for x in (opened, *base) if x["licence"]), {})
    sha256 = {k: v for x in (*base, opened) for k, v in x["sha256"].items()}
    return opened | {"sha256": sha256, "licence": licence}
