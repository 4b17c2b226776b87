"""One modality's model: its language model and its towers, from wherever it comes.

Specialists come as Hugging Face folders, hub ids or loaded models. Their language models' names
differ on disk and in memory; here they have those of the language model's own checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from optmerge_core.checkpoints.folder import Checkpoint
from optmerge_core.checkpoints.formats import ADAPTER_CONFIG, CheckpointError, read_json
from optmerge_core.checkpoints.lora_settings import LoraSettings
from optmerge_core.checkpoints.names import (
    EMBEDDINGS,
    HEAD,
    is_embeddings,
    is_head,
    language_name,
)
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.checkpoints.weights import IN_MEMORY, Renamed
from optmerge_core.evaluation.placed import placed
from optmerge_core.merging.experts import Opened, check_config
from optmerge_core.merging.families import mergeable
from optmerge_core.omni.model import specialist_class, without_layers

FREQUENCIES = "rotary_emb.inv_freq"  # buffers, which older versions of transformers saved


class LanguageModel(Renamed):
    """The language model within weights or a state dict, one tensor at a time.

    names: those that count, in the language model's own checkpoint; default all parameters.
    """

    def __init__(self, weights: Mapping[str, Tensor], names: Collection[str] | None = None):
        found = {language_name(x): x for x in weights if not x.endswith(FREQUENCIES)}
        own = {n: own for n, own in found.items() if n and (names is None or n in names)}
        super().__init__(weights, own)

    def config(self) -> dict[str, Any]:
        whole = super().config()
        return whole.get("text_config") or whole


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
    """A folder, a hub id, a PEFT adapter of a specialist's folder, or a loaded model.

    Raises `CheckpointError` for what is no multimodal model, or an adapter that PEFT cannot merge.
    """
    if isinstance(source, PreTrainedModel):
        return _of_a_model(source, None, ())
    opened = open_checkpoint(source, adapter=True)
    if opened.is_adapter:
        adapted, base = _with_adapter(opened)
        return _of_a_model(adapted, base.folder, (opened, base))
    check_config(opened)
    config, folder = opened.config(), opened.folder
    towers = _towers(_load(opened, without_layers(config), towers_alone=True), folder)
    tokenizer = load_tokenizer(folder)
    return Specialist(config, LanguageModel(opened), towers, tokenizer, folder, (opened,))


def _of_a_model(
    model: PreTrainedModel, folder: Path | None, read: tuple[Checkpoint, ...]
) -> Specialist:
    """A specialist in memory; the tokenizer is the first of what was `read` that has one."""
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    language_model = LanguageModel(model.state_dict())
    tokenizer = next(filter(None, (load_tokenizer(x.folder) for x in read)), None)
    return Specialist(config, language_model, _towers(model, folder), tokenizer, folder, read)


def _with_adapter(adapter: Checkpoint) -> tuple[PreTrainedModel, Checkpoint]:
    """The specialist that an adapter makes, and its base."""
    path = adapter.folder / ADAPTER_CONFIG
    settings = read_json(path)
    if settings.get("peft_type") == "LORA":
        LoraSettings(path, by_peft=True)
    given = settings.get("base_model_name_or_path") or ""
    beside = adapter.folder / given
    try:
        base = open_checkpoint(beside if given and beside.is_dir() else given)
        check_config(base)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: base_model_name_or_path {given!r} must name the specialist that this is an "
            f"adapter of, its folder or hub id ({error})"
        ) from error
    model = _load(base, AutoConfig.for_model(**base.config()))
    rows = [adapter.shape(name)[0] for name in adapter if is_embeddings(name) or is_head(name)]
    try:
        if rows and max(rows) != len(model.get_input_embeddings().weight):
            model.resize_token_embeddings(max(rows), mean_resizing=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is dep")  # PEFT asks it
            adapted = PeftModel.from_pretrained(model, adapter.folder, **placed(adapter, model))
        for name, module in adapted.named_modules():
            if isinstance(module, LoraLayer) and "language_model" in name:
                module.float()  # rounded to the base's dtype, a small update would be lost
        return adapted.merge_and_unload(), base
    except Exception as error:  # whatever PEFT says, of any type
        raise CheckpointError(
            f"{adapter.folder}: PEFT cannot merge this adapter into {base.folder} "
            f"({_in_one_line(error)}); is it another model's? If not, merge it where it was "
            "trained and give that folder"
        ) from error


def _load(
    weights: Checkpoint, config: PretrainedConfig, towers_alone: bool = False
) -> PreTrainedModel:
    """from_pretrained, whole or without the language model, with every tensor that it needs."""
    own = {name for name in weights if not (towers_alone and language_name(name))}
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        model, info = specialist_class(weights.config()).from_pretrained(
            None,
            config=config,
            state_dict={name: weights[name] for name in weights if name in own},
            dtype="auto",
            output_loading_info=True,
        )
    except RuntimeError as error:
        raise CheckpointError(
            f"{weights.folder}: its weights are not those of its config.json "
            f"({_in_one_line(error)}); save or download it again"
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(level)
    missing = [n for n in info["missing_keys"] if not (towers_alone and language_name(n))]
    if missing:
        raise CheckpointError(
            f"{weights.folder}: {len(missing)} parameters of the model are missing ({missing[0]}); "
            "save or download it again"
        )
    return model


def _in_one_line(error: Exception, most: int = 300) -> str:
    return " ".join(str(error).split())[:most] or type(error).__name__


def _towers(model: PreTrainedModel, place: Path | None) -> dict[str, Tensor]:
    if not hasattr(model.base_model, "language_model"):
        raise CheckpointError(
            f"{place or IN_MEMORY}: {type(model).__name__} has no towers beside a language_model; "
            "specialists are multimodal models that have"
        )
    state = model.base_model.state_dict()
    return {name: t for name, t in state.items() if not name.startswith("language_model.")}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ImportError, ValueError) as error:
        if (folder / "tokenizer.json").is_file():
            raise
        raise CheckpointError(
            f"{folder}: its only tokenizer is tokenizer.model, which transformers reads with two "
            "packages more: pip install sentencepiece protobuf"
        ) from error


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
    router: str = "merge",
) -> tuple[Opened, dict[str, Specialist]]:
    """The language models, as a base and its experts, and the specialists, both by modality.

    The experts have all of the base's parameters, and no more rows. Raises `CheckpointError` for a
    specialist that is built on another language model.
    """
    base = LanguageModel(open_checkpoint(base_language_model))
    check_config(base)
    opened = {modality: open_specialist(source) for modality, source in specialists.items()}
    for modality, specialist in opened.items():
        check_language_model(modality, specialist, base)
    model_type = family or base.config().get("model_type")
    names = mergeable(base.shapes(), model_type, scope, router)
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
    own = specialist.language_model
    if HEAD in own and HEAD not in base and not torch.equal(own[HEAD], own[EMBEDDINGS]):
        raise CheckpointError(
            f"{modality}: {HEAD} is not the specialist's embeddings, which {base.folder} ties it "
            "to; give the base saved with tie_word_embeddings=False and its head beside"
        )
