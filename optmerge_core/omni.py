"""Omni models (Section 5): language models merged, tokenizers reconciled, towers copied.

Specialists come as Hugging Face folders, hub ids or loaded models. Their language models' names
differ on disk and in memory; here they have those of the language model's own checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from optmerge_core.adapters import CONFIG_NAME
from optmerge_core.checkpoints import (
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    read_json,
)
from optmerge_core.checks import check_request, in_range, parse_device
from optmerge_core.merge import parameter_merger
from optmerge_core.omni_model import (
    OmniConfig,
    OmniForConditionalGeneration,
    specialist_class,
    without_layers,
)
from optmerge_core.parallel import in_order
from optmerge_core.parameters import mergeable
from optmerge_core.task_vectors import TaskVectors, apply
from optmerge_core.writer import CheckpointWriter, check_output, side_files

__all__ = ["OmniConfig", "OmniForConditionalGeneration", "compose"]

_PREFIX = r"(?:model\.|language_model\.)*"
_LANGUAGE = re.compile(_PREFIX + r"(layers\.\d+\..+|embed_tokens\.weight|norm\.weight)")
_HEAD = re.compile(_PREFIX + r"lm_head\.weight")
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKEN_ID = re.compile(r".+_token_(id|index)")


def language_name(name: str) -> str | None:
    """A parameter's name in the language model's own checkpoint; None for a tower's."""
    if match := _LANGUAGE.fullmatch(name):
        return f"model.{match[1]}"
    return HEAD if _HEAD.fullmatch(name) else None


class LanguageModel(Mapping[str, Tensor]):
    """The language model within a checkpoint or state dict, one tensor at a time."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights = weights
        found = {name: language_name(name) for name in weights}
        self._names = {ours: name for name, ours in found.items() if ours is not None}

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header where the weights are on disk."""
        weights, own = self.weights, self._names[name]
        return tuple(weights.shape(own) if isinstance(weights, Checkpoint) else weights[own].shape)


@dataclass(frozen=True)
class Specialist:
    """One modality's model: configuration, language model, towers (name -> tensor), tokenizer."""

    config: dict[str, Any]
    language_model: LanguageModel
    towers: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase | None
    folder: Path | None


def open_specialist(source: str | Path | PreTrainedModel) -> Specialist:
    """A folder, a hub id, a PEFT adapter of a specialist's folder, or a loaded model."""
    folder = None
    if not isinstance(source, PreTrainedModel):
        opened = open_checkpoint(source, adapter=True)
        folder, config = opened.folder, opened.config()
        if opened.is_adapter:
            source, folder = _with_adapter(folder)
        else:
            shrunk = without_layers(config)
            towers = _load(specialist_class(config), folder, config=shrunk)
            return Specialist(
                config, LanguageModel(opened), _towers(towers), _tokenizer(folder), folder
            )
    config = source.config.to_dict() | {"architectures": [type(source).__name__]}
    language_model = LanguageModel(source.state_dict())
    tokenizer = _tokenizer(folder) if folder else None
    return Specialist(config, language_model, _towers(source), tokenizer, folder)


def _with_adapter(folder: Path) -> tuple[PreTrainedModel, Path]:
    given = read_json(folder / CONFIG_NAME).get("base_model_name_or_path") or ""
    base = folder / given if (folder / given).is_dir() else Path(given)
    opened = open_checkpoint(base)
    model = _load(specialist_class(opened.config()), opened.folder)
    adapted = PeftModel.from_pretrained(model, folder)
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and "language_model" in name:
            module.float()  # rounded to the base's dtype, a small update would be lost
    return adapted.merge_and_unload(), opened.folder


def _load(model_class: type[PreTrainedModel], folder: Path, **options: Any) -> PreTrainedModel:
    """from_pretrained without its report of the weights that were left out on purpose."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        return model_class.from_pretrained(folder, dtype="auto", **options)
    finally:
        transformers.utils.logging.set_verbosity(level)


def _towers(model: PreTrainedModel) -> dict[str, Tensor]:
    state = model.base_model.state_dict()
    return {name: t for name, t in state.items() if not name.startswith("language_model.")}


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(folder)


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
    processor files lie in `specialists/<modality>`.

    Raises `ValueError` (`CheckpointError` for files), and nothing is left at `output_dir`.
    """
    options = dict(method_options or ({"preset": "modality"} if method == "optmerge" else {}))
    check_request(specialists, method, options, scaling_coefficient, "tensor")
    check_output(output_dir, overwrite=overwrite)
    weights = open_checkpoint(base_language_model)
    base, config = LanguageModel(weights), weights.config()
    opened = {modality: open_specialist(source) for modality, source in specialists.items()}
    for modality, specialist in opened.items():
        _check_language_model(modality, specialist, base)
    tokenizer = _tokenizer(weights.folder)
    ids = reconcile(tokenizer, opened) if tokenizer else {modality: {} for modality in opened}
    _check_placeholders(opened, ids)

    experts = {modality: specialist.language_model for modality, specialist in opened.items()}
    names = mergeable({name: base.shape(name) for name in base}, config.get("model_type"))
    merging, device = frozenset(names), parse_device(device)
    task_vectors = TaskVectors(base, experts, names, device)
    merge_parameter = parameter_merger(task_vectors, method, options, seed, "tensor")

    def result(name: str) -> Tensor:
        own = base[name]
        if name in merging:
            return apply(own, merge_parameter(name)[1].cpu(), scaling_coefficient, own.dtype)
        changes = [expert[name][: len(own)].float() - own.float() for expert in experts.values()]
        return (own.float() + torch.stack(changes).mean(0)).to(own.dtype)

    with CheckpointWriter(output_dir, max_shard_size, overwrite=overwrite) as writer:
        progress = tqdm(base, desc=f"merging ({method})", unit="parameter")
        for name, tensor in zip(progress, in_order(result, base, device), strict=True):
            if name in (EMBEDDINGS, HEAD):
                tensor = _with_added_rows(name, tensor, opened, ids)
                config["vocab_size"] = len(tensor)
            bare = name.removeprefix("model.")
            target = HEAD if name == HEAD else f"language_model.{bare}"
            writer.add(target, in_range(name, tensor))
        for modality, specialist in opened.items():
            for name, tensor in specialist.towers.items():
                writer.add(f"specialists.{modality}.{name}", tensor)
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
        report = {
            "method": method,
            "method_options": options,
            "scaling_coefficient": scaling_coefficient,
            "seed": seed,
            "base_language_model": str(base_language_model),
            "specialists": {
                m: str(source) if isinstance(source, str | Path) else type(source).__name__
                for m, source in specialists.items()
            },
            "added_tokens": ids,
            "parameters_merged": len(names),
            "versions": {p: version(p) for p in ("torch", "transformers", "safetensors")},
        }
        writer.write_text("merge_report.json", json.dumps(report, indent=2, default=str) + "\n")
    return Path(output_dir)


def _check_language_model(modality: str, specialist: Specialist, base: LanguageModel) -> None:
    for name in base:
        if name not in specialist.language_model:
            if name == HEAD:  # tied to the embeddings
                continue
            raise CheckpointError(
                f"{modality}: the specialist's language model has no {name}; is it built on "
                f"{base.weights.folder}?"
            )
        ours, theirs = base.shape(name), specialist.language_model.shape(name)
        grown = name in (EMBEDDINGS, HEAD) and theirs[0] >= ours[0] and theirs[1:] == ours[1:]
        if ours != theirs and not grown:
            raise CheckpointError(
                f"{modality}: {name} has shape {theirs} in the specialist and {ours} in "
                f"{base.weights.folder}; specialists must share one language model"
            )
    extra = [name for name in specialist.language_model if name not in base and name != HEAD]
    if extra:
        raise CheckpointError(
            f"{modality}: the specialist's language model has {extra[0]}, which "
            f"{base.weights.folder} has not; specialists must share one language model"
        )


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
