"""Omni models (Section 5): language models merged, tokenizers reconciled, towers copied."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optmerge_core.checkpoints.names import EMBEDDINGS, HEAD
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.checkpoints.writer import CheckpointWriter, check_output, side_files
from optmerge_core.merging.card import omni_card
from optmerge_core.merging.checks import check_finite, check_read, check_request, in_range
from optmerge_core.merging.families import mergeable
from optmerge_core.merging.merge import parameter_merger
from optmerge_core.merging.report import MergeReport, describe, record_of
from optmerge_core.omni.model import OmniConfig, OmniForConditionalGeneration
from optmerge_core.omni.specialists import (
    LanguageModel,
    Specialist,
    check_language_model,
    load_tokenizer,
    open_specialist,
)
from optmerge_core.runtime import in_order, parse_device, peak_memory, reset_peak_memory
from optmerge_core.task_vectors.stack import TaskVectors, apply

__all__ = ["OmniConfig", "OmniForConditionalGeneration", "compose"]

TOKEN_ID = re.compile(r".+_token_(id|index)")


def reconcile(
    base: PreTrainedTokenizerBase, specialists: Mapping[str, Specialist]
) -> dict[str, dict[int, int]]:
    """Add every specialist's own tokens to the base tokenizer; modality -> its ids -> new ids.

    The base's tokens must have the base's ids in every specialist. A specialist without a tokenizer
    keeps the ids of its placeholders.
    """
    known, ids = base.get_vocab(), {}
    for modality, specialist in specialists.items():
        if specialist.tokenizer is None:
            ids[modality] = {n: n for n in _placeholders(specialist.config).values()}
            continue
        vocabulary = specialist.tokenizer.get_vocab()
        for token, number in sorted(vocabulary.items(), key=lambda item: item[1]):
            if known.get(token, number) != number or (token not in known and number < len(known)):
                raise ValueError(
                    f"{modality}: token {token!r} is number {number} in its tokenizer, "
                    f"{known.get(token, 'absent')} in the base's: all specialists must be built on "
                    "the same language model and only add tokens to its vocabulary"
                )
        added = specialist.tokenizer.added_tokens_decoder
        own = {number: token for token, number in vocabulary.items() if token not in known}
        base.add_tokens([added.get(number, token) for number, token in sorted(own.items())])
        ids[modality] = {number: base.convert_tokens_to_ids(own[number]) for number in own}
    return ids


def compose(
    base_language_model: str | Path,
    specialists: Mapping[str, str | Path | PreTrainedModel],
    output_dir: str | Path,
    *,
    method: str = "optmerge",
    method_options: Mapping[str, Any] | None = None,
    scaling_coefficient: float = 1.0,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    max_shard_size: int | str = "400MB",
) -> Path:
    """Merge the specialists' language models and write one Omni model with all their towers.

    base_language_model: folder or hub id of the language model that all specialists started from;
    specialists: modality -> folder, hub id, PEFT adapter or loaded model. The linear layers become
    base + scaling_coefficient * METHODS[method](task vectors), OptMerge with its preset `modality`
    unless told otherwise; embeddings, norms and lm_head become the specialists' mean. Tokens that
    specialists added get numbers of their own after the base's. `output_dir` then opens with
    `OmniForConditionalGeneration.from_pretrained`; each specialist's configuration, tokenizer and
    processor files lie in `specialists/<modality>`; `merge_report.json` and a model card say what
    was merged.

    Raises `ValueError` (`CheckpointError` for files), and nothing is left at `output_dir`.
    """
    started = time.perf_counter()
    options = dict(method_options or ({"preset": "modality"} if method == "optmerge" else {}))
    check_request(specialists, method, options, scaling_coefficient, "tensor")
    check_output(output_dir, overwrite=overwrite)
    device = parse_device(device)
    reset_peak_memory(device)
    weights = open_checkpoint(base_language_model)
    base, config = LanguageModel(weights), weights.config()
    opened = {modality: open_specialist(source) for modality, source in specialists.items()}
    for modality, specialist in opened.items():
        check_language_model(modality, specialist, base)
    tokenizer = load_tokenizer(weights.folder)
    ids = reconcile(tokenizer, opened) if tokenizer else {modality: {} for modality in opened}
    _check_placeholders(opened, ids)

    experts = {modality: specialist.language_model for modality, specialist in opened.items()}
    names = mergeable(base.shapes(), config.get("model_type"))
    towers = {f"specialists.{m}.{n}": t for m, s in opened.items() for n, t in s.towers.items()}
    check_finite(base, experts, list(base))
    for name, tensor in towers.items():
        check_read(name, "its specialist", tensor)
    merging, records = frozenset(names), []
    task_vectors = TaskVectors(base, experts, names, device)
    merge_parameter = parameter_merger(task_vectors, method, options, seed, "tensor")

    def result(name: str) -> tuple[Tensor, dict[str, Any] | None]:
        own = base[name]
        if name in merging:
            stack, merged = merge_parameter(name)
            record = record_of(name, own, stack, merged, list(experts))
            return apply(own, merged.cpu(), scaling_coefficient, own.dtype), record
        changes = [expert[name][: len(own)].float() - own.float() for expert in experts.values()]
        return (own.float() + torch.stack(changes).mean(0)).to(own.dtype), None

    with CheckpointWriter(output_dir, max_shard_size, overwrite=overwrite) as writer:
        progress = tqdm(base, desc=f"merging ({method})", unit="parameter")
        results = in_order(result, base, device)
        for name, (tensor, record) in zip(progress, results, strict=True):
            records += [record] if record else []
            if name in (EMBEDDINGS, HEAD):
                tensor = _with_added_rows(name, tensor, opened, ids)
                config["vocab_size"] = len(tensor)
            bare = name.removeprefix("model.")
            target = HEAD if name == HEAD else f"language_model.{bare}"
            writer.add(target, in_range(name, tensor))
        for name, tensor in towers.items():
            writer.add(name, tensor)
        omni = OmniConfig(
            text_config=config,
            specialists={m: _renumbered(s.config, ids[m]) for m, s in opened.items()},
            dtype=config.get("dtype") or config.get("torch_dtype"),
            architectures=[OmniForConditionalGeneration.__name__],
        )
        writer.write_text("config.json", omni.to_json_string())
        if tokenizer:
            tokenizer.save_pretrained(writer.folder)
        for modality, specialist in opened.items():
            target = writer.folder / "specialists" / modality
            target.mkdir(parents=True)
            for path in side_files(specialist.folder) if specialist.folder else ():
                (target / path.name).write_bytes(path.read_bytes())
        peak_memory_bytes, peak_device_memory_bytes = peak_memory(device)
        report = MergeReport(
            output_dir=str(output_dir),
            method=method,
            method_options=options,
            scaling_coefficient=scaling_coefficient,
            trim="tensor",
            seed=seed,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            dtype=None,
            model_type=config.get("model_type"),
            base_model=describe(base_language_model, weights),
            experts={m: _describe(specialists[m], s) for m, s in opened.items()},
            parameters=records,
            parameters_kept=len(base) - len(records),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes,
            peak_device_memory_bytes=peak_device_memory_bytes,
            versions={p: version(p) for p in ("torch", "transformers", "safetensors")},
            added_tokens=ids,
        )
        writer.write_text("merge_report.json", report.to_json())
        writer.write_text("README.md", omni_card(report))
    return Path(output_dir)


def _describe(source: str | Path | PreTrainedModel, specialist: Specialist) -> dict[str, Any]:
    """As `describe`; of an adapter with its base's hashes, of a loaded model its class alone."""
    if not specialist.read:
        return {"location": type(source).__name__, "revision": None, "source": None, "sha256": {}}
    opened, *base = [describe(source, checkpoint) for checkpoint in specialist.read]
    return opened | {"sha256": {k: v for x in (*base, opened) for k, v in x["sha256"].items()}}


def _placeholders(config: Mapping[str, Any]) -> dict[str, int]:
    found = {k: v for k, v in config.items() if TOKEN_ID.fullmatch(k) and isinstance(v, int)}
    return {k: v for k, v in found.items() if not k.startswith(("pad", "bos", "eos"))}


def _renumbered(config: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """A specialist's config with its modality tokens' numbers in the common vocabulary."""
    return dict(config) | {k: ids.get(v, v) for k, v in _placeholders(config).items()}


def _check_placeholders(
    opened: Mapping[str, Specialist], ids: Mapping[str, Mapping[int, int]]
) -> None:
    """Without tokenizers, two kinds of input may claim one token number."""
    owners: dict[int, tuple[str, str]] = {}
    for modality, specialist in opened.items():
        for key, number in _placeholders(_renumbered(specialist.config, ids[modality])).items():
            kind = TOKEN_ID.sub("", key) or key.split("_token_")[0]
            other = owners.setdefault(number, (modality, kind))
            if other[1] != kind:
                raise ValueError(
                    f"{modality} uses token {number} for {key}, {other[0]} for {other[1]} input: "
                    "give specialists with tokenizers, so that their tokens can be renumbered"
                )


def _with_added_rows(
    name: str,
    rows: Tensor,
    opened: Mapping[str, Specialist],
    ids: Mapping[str, Mapping[int, int]],
) -> Tensor:
    """Rows of added tokens after the base's, from the first specialist that has them.

    Placeholders' rows are never read: features stand in their place.
    """
    size = max([len(rows), *(1 + new for own in ids.values() for new in own.values())])
    table = torch.cat([rows, rows.new_zeros(size - len(rows), rows.shape[1])])
    filled: dict[int, str] = {}
    for modality, own in ids.items():
        specialist = opened[modality]
        if name not in specialist.language_model:
            continue
        theirs = specialist.language_model[name]
        placeholders = set(_placeholders(specialist.config).values())
        for old, new in own.items():
            if old >= len(theirs) or (new in filled and old in placeholders):
                continue
            row = theirs[old].to(table.dtype)
            if new in filled and not torch.equal(table[new], row):
                raise ValueError(
                    f"{name}: token {new} is trained in {filled[new]} and in {modality}, with "
                    "different values; rename it in one of the tokenizers"
                )
            table[new], filled[new] = row, modality
    return table
