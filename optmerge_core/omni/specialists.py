"""One modality's model: its language model and its towers, from wherever it comes.

Specialists come as Hugging Face folders, hub ids or loaded models. Their language models' names
differ on disk and in memory; here they have those of the language model's own checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from optmerge_core.checkpoints.adapters import CONFIG_NAME
from optmerge_core.checkpoints.folder import Checkpoint
from optmerge_core.checkpoints.formats import CheckpointError, read_json
from optmerge_core.checkpoints.names import EMBEDDINGS, HEAD, language_name
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.checkpoints.weights import Renamed
from optmerge_core.merging.experts import Opened
from optmerge_core.merging.families import mergeable
from optmerge_core.omni.model import specialist_class, without_layers


class LanguageModel(Renamed):
    """The language model within weights or a state dict, one tensor at a time.

    names: those that count, in the language model's own checkpoint; default all.
    """

    def __init__(self, weights: Mapping[str, Tensor], names: Collection[str] | None = None):
        found = {language_name(name): name for name in weights}
        own = {n: own for n, own in found.items() if n and (names is None or n in names)}
        super().__init__(weights, own)


@dataclass(frozen=True)
class Specialist:
    """One modality's model: configuration, language model, towers (name -> tensor), tokenizer."""

    config: dict[str, Any]
    language_model: LanguageModel
    towers: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase | None
    folder: Path | None
    read: tuple[Checkpoint, ...] = ()
    """what was opened: a model, or an adapter and its base; nothing of a loaded model"""


def open_specialist(source: str | Path | PreTrainedModel) -> Specialist:
    """A folder, a hub id, a PEFT adapter of a specialist's folder, or a loaded model."""
    folder, read = None, ()
    if not isinstance(source, PreTrainedModel):
        opened = open_checkpoint(source, adapter=True)
        folder, config = opened.folder, opened.config()
        if opened.is_adapter:
            source, base = _with_adapter(folder)
            folder, read = base.folder, (opened, base)
        else:
            shrunk = without_layers(config)
            towers = _load(specialist_class(config), folder, config=shrunk)
            language_model, tokenizer = LanguageModel(opened), load_tokenizer(folder)
            towers = _towers(towers)
            return Specialist(config, language_model, towers, tokenizer, folder, (opened,))
    config = source.config.to_dict() | {"architectures": [type(source).__name__]}
    language_model = LanguageModel(source.state_dict())
    tokenizer = load_tokenizer(folder) if folder else None
    return Specialist(config, language_model, _towers(source), tokenizer, folder, read)


def _with_adapter(folder: Path) -> tuple[PreTrainedModel, Checkpoint]:
    given = read_json(folder / CONFIG_NAME).get("base_model_name_or_path") or ""
    base = folder / given if (folder / given).is_dir() else Path(given)
    opened = open_checkpoint(base)
    model = _load(specialist_class(opened.config()), opened.folder)
    adapted = PeftModel.from_pretrained(model, folder)
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and "language_model" in name:
            module.float()  # rounded to the base's dtype, a small update would be lost
    return adapted.merge_and_unload(), opened


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


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(folder)


class BaseRows(Renamed):
    """A specialist's language model with the rows that the base has, without added tokens'."""

    def __init__(self, language_model: LanguageModel, base: LanguageModel):
        # A specialist without a head of its own has it tied to its embeddings.
        own = {name: name if name in language_model else EMBEDDINGS for name in base}
        super().__init__(language_model, own)
        self.base = base

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name)[: self.shape(name)[0]]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)


def open_language_models(
    base_language_model: str | Path,
    specialists: Mapping[str, str | Path | PreTrainedModel],
    *,
    family: str | None = None,
    scope: str = "linear",
) -> tuple[Opened, dict[str, Specialist]]:
    """The language models, as a base and its experts, and the specialists, both by modality.

    The experts have all of the base's parameters, and no more rows. Raises `CheckpointError` for a
    specialist that is built on another language model.
    """
    base = LanguageModel(open_checkpoint(base_language_model))
    opened = {modality: open_specialist(source) for modality, source in specialists.items()}
    for modality, specialist in opened.items():
        check_language_model(modality, specialist, base)
    model_type = family or base.config().get("model_type")
    names = mergeable(base.shapes(), model_type, scope)
    experts = {modality: BaseRows(s.language_model, base) for modality, s in opened.items()}
    return Opened(base, experts, names, {}, model_type), opened


def check_language_model(modality: str, specialist: Specialist, base: LanguageModel) -> None:
    for name in base:
        if name not in specialist.language_model:
            if name == HEAD:  # tied to the embeddings
                continue
            raise CheckpointError(
                f"{modality}: the specialist's language model has no {name}; is it built on "
                f"{base.folder}?"
            )
        ours, theirs = base.shape(name), specialist.language_model.shape(name)
        grown = name in (EMBEDDINGS, HEAD) and theirs[0] >= ours[0] and theirs[1:] == ours[1:]
        if ours != theirs and not grown:
            raise CheckpointError(
                f"{modality}: {name} has shape {theirs} in the specialist and {ours} in "
                f"{base.folder}; specialists must share one language model"
            )
    extra = [name for name in specialist.language_model if name not in base and name != HEAD]
    if extra:
        raise CheckpointError(
            f"{modality}: the specialist's language model has {extra[0]}, which "
            f"{base.folder} has not; specialists must share one language model"
        )
