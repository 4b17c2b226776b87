"""Whose processor, tokenizer and chat template a merged model has: the base's, or another's.

The base model's, unless its chat template makes empty prompts, as a pre-trained model's may: then
the experts', where theirs are one. A name or a folder says it outright.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optmerge_core.checkpoints.formats import side_files
from optmerge_core.checkpoints.names import is_embeddings
from optmerge_core.checkpoints.weights import Weights
from optmerge_core.checkpoints.writer import CheckpointWriter
from optmerge_core.merging.checks import notice
from optmerge_core.merging.prompting import token_ids
from optmerge_core.merging.templates import (
    chat_template,
    default_template,
    fault,
    json_of,
    takes_pictures,
)

FILES = re.compile(
    r".*(?:tokeniz|process|feature_extract).*\.(?:json|py|model)|.*\.(?:jinja|model|tiktoken)|"
    r"(?:special_tokens_map|added_tokens|vocab|merges|chat_template)\.(?:json|txt)"
)
"""The side files of processor, tokenizer and chat template; all others describe the model."""
TEMPLATES = re.compile(r".*\.jinja|chat_template\.json")
IMAGE_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = re.compile(r"tokenizer\.(?:json|model)|vocab\.(?:json|txt)|.*\.(?:model|tiktoken)")


@dataclass(frozen=True)
class Processor:
    """What a merged model is prompted by."""

    owner: str = "base"
    """"base", an expert's name, or a folder"""
    folder: Path | None = None
    template: str | None = None
    """a chat template in the place of the folder's own"""

    @property
    def own_template(self) -> Any:
        """What prompts are made by: a template, several, or None."""
        return self.template or (chat_template(self.folder) if self.folder else None)


def choose(
    base: Weights,
    experts: Mapping[str, Weights],
    asked: str | Path | None = None,
    template: str | None = None,
) -> Processor:
    """The processor that is `asked` for: "base", an expert's name or a folder; None decides.

    `template` replaces its chat template: Jinja, or "auto", mergekit's word for the one that most
    of base and experts have.

    Raises `ValueError` for what is none, lacks files that the base's has, or numbers tokens
    otherwise than the base, whose embeddings the merged model has. What is worth it is a notice.
    """
    own = Processor("base", base.folder)
    folders = {name: expert.folder for name, expert in experts.items()}
    if asked is None:
        chosen = own if template else _decided(own, base, folders)
    else:
        chosen = _asked(own, str(asked), folders)
        if chosen.folder != own.folder:
            for text in _unlike(base, chosen):
                notice(text)
    if template is not None:
        chosen = replace(chosen, template=_replacing(template, [own.folder, *folders.values()]))
    if (template or asked is not None) and (problem := _fault(chosen, base)):
        notice(f"processor {chosen.owner}: {problem}; choose another by processor")
    return chosen


def _decided(own: Processor, base: Weights, folders: Mapping[str, Path | None]) -> Processor:
    """The base's, or that of the experts where the base's makes empty prompts."""
    named = {name: x for name, x in folders.items() if x is not None and chat_template(x)}
    if (problem := _fault(own, base)) is None or own.folder is None:
        return own
    if not named:
        if chat_template(own.folder) is not None:
            notice(
                f"base model: {problem}, and no expert has another; name the folder of a processor "
                "with one (processor, --processor)"
            )
        return own
    candidates = [Processor(name, folder) for name, folder in named.items()]
    remedy = f"say whose to take: processor (--processor) {' | '.join(named)} | folder"
    reasons = []
    for one in candidates:
        try:
            found = [*_unlike(base, one), _fault(one, base)]
        except ValueError as error:
            found = [str(error)]
        reasons += [f"expert {one.owner}: {text}" for text in found if text]
    if len({_text(one.folder) for one in candidates}) > 1:
        reasons = [f"the chat templates of {', '.join(named)} are not one", *reasons]
    if reasons:
        notice(f"base model: {problem}; the experts' are not taken ({reasons[0]}): {remedy}")
        return own
    chosen = candidates[0]
    others = [one.owner for one in candidates if _settings(one.folder) != _settings(chosen.folder)]
    differ = f"; the image processor's settings of {', '.join(others)} differ" if others else ""
    notice(
        f"base model: {problem}; processor and chat template are those of expert {chosen.owner}, "
        f"the template that of all experts who have one ({', '.join(named)}){differ}"
    )
    return chosen


def _asked(own: Processor, asked: str, folders: Mapping[str, Path | None]) -> Processor:
    if asked == "base":
        return own
    if asked in folders and (folder := folders[asked]) is None:
        raise ValueError(f"processor {asked!r}: that expert is a model in memory, without files")
    folder = folders.get(asked) or Path(asked).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"processor {asked!r} is neither base, nor an expert ({', '.join(folders)}), nor a "
            "folder"
        )
    return Processor(asked if asked in folders else str(folder.resolve()), folder)


def _unlike(base: Weights, chosen: Processor) -> list[str]:
    """How a processor's tokens are not the base's, in sentences; `ValueError` where it cannot be.

    A token has its embedding by its number.
    """
    ours, theirs = base.folder, chosen.folder
    if ours is None or theirs is None:
        return []
    what = f"processor {chosen.owner}"
    for kind, found in (("image processor", _has_images), ("tokenizer", has_tokens)):
        if found(ours) and not found(theirs):
            raise ValueError(f"{what}: {theirs} has no {kind}, and the base has; choose another")
    known, own = token_ids(ours), token_ids(theirs)
    if not known or not own:
        files = [path.name for path in side_files(theirs) if TOKENIZER.fullmatch(path.name)]
        same = all(_content(ours / name) == _content(theirs / name) for name in files)
        text = f"{what}: its tokens cannot be compared with the base's, whose embeddings are kept"
        return [] if same else [text]
    words, rows = {number: word for word, number in known.items()}, embedding_rows(base)
    wrong = [
        f"{word!r} is number {number}, and the base's {known[word]}"
        for word, number in own.items()
        if known.get(word, number) != number
    ]
    wrong += [
        f"{word!r} is number {number}, which is {words[number]!r} of the base"
        for word, number in own.items()
        if word not in known and number in words
    ]
    wrong += [
        f"{word!r} is number {number}, and the base has {rows} embeddings"
        for word, number in own.items()
        if word not in known and number >= rows > 0
    ]
    if wrong:
        raise ValueError(
            f"{what}: its tokenizer does not fit the embeddings, which are the base's, in "
            f"{len(wrong)} tokens ({wrong[0]}); choose one with the base's tokens"
        )
    if new := [word for word in own if word not in known]:
        return [
            f"{what}: its tokenizer has {len(new)} tokens that the base's lacks ({new[0]}); their "
            "embeddings are the base's, which was not trained on them"
        ]
    return []


def _fault(chosen: Processor, base: Weights) -> str | None:
    """What is wrong with its prompts. None where there is no template nor need of any."""
    if (folder := chosen.folder) is None:
        return None
    return fault(folder, chosen.own_template, takes_pictures(base.config(), folder))


def _replacing(template: str, folders: list[Path | None]) -> str:
    if template != "auto":
        if "{" not in template:
            raise ValueError(f"chat_template {template!r}: give auto, or a template in Jinja")
        return template
    found = Counter(text for folder in folders if folder and (text := _text(folder)))
    if not found:
        raise ValueError("chat_template 'auto': neither the base model nor an expert has one")
    return found.most_common(1)[0][0]


def write_side_files(writer: CheckpointWriter, base_folder: Path, chosen: Processor) -> None:
    """All that is not weights: the base's, with the chosen processor's files for its own."""
    if chosen.owner == "base" and chosen.template is None:
        writer.copy_side_files(base_folder)
        return
    folder = chosen.folder or base_folder
    writer.copy_side_files(base_folder, lambda name: not FILES.fullmatch(name))
    writer.copy_side_files(
        folder,
        lambda name: (
            bool(FILES.fullmatch(name)) and not (chosen.template and TEMPLATES.fullmatch(name))
        ),
    )
    if chosen.template:
        writer.write_text("chat_template.jinja", chosen.template)
        name = "tokenizer_config.json"  # where transformers looks that knows no .jinja
        if "chat_template" in (content := json_of(folder / name)):
            content["chat_template"] = chosen.template
            writer.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _text(folder: Path | None) -> str | None:
    return default_template(chat_template(folder)) if folder else None


def _settings(folder: Path | None) -> list[dict[str, Any]]:
    return [json_of(folder / name) for name in IMAGE_PROCESSOR] if folder else []


def _has_images(folder: Path) -> bool:
    return any((folder / name).is_file() for name in IMAGE_PROCESSOR)


def has_tokens(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files."""
    return any(TOKENIZER.fullmatch(path.name) for path in side_files(folder))


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def embedding_rows(weights: Weights) -> int:
    """Rows of the embeddings; 0 where no parameter is named as such."""
    shapes = weights.shapes().items()
    rows = [shape[0] for name, shape in shapes if is_embeddings(name) and shape]
    return rows[0] if len(rows) == 1 else 0
