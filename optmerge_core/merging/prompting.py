"""What a model is prompted and generates by, where an expert's is not the base's.

The merged model has one tokenizer and chat template, the base's unless another's were chosen
(`processor.py`), and the base's generation settings. An expert that was trained with others may do
less well in it, which nothing else shows: each is worth a notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from optmerge_core.checkpoints.weights import Weights
from optmerge_core.merging.templates import chat_template, json_of

GENERATION = {
    **{"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None},
    **{"typical_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1},
    **{"length_penalty": 1.0, "max_length": None, "max_new_tokens": None},
}
"""What decides an answer in generation_config.json, and transformers' default of each."""


def differences(
    base: Weights, experts: Mapping[str, Weights], owner: str, folder: Path | None, template: Any
) -> list[str]:
    """A sentence for each way in which experts (name -> weights) are prompted otherwise.

    Than the merged model, by the processor of `owner` ("base", an expert or a folder) in `folder`
    and `template`, which is its chat template.
    """
    owners: dict[str, list[str]] = {}
    tokens = cache(_tokens)  # a large file, of the base the same each time
    whose = "the base's" if owner == "base" else f"that of {owner}"
    for name, expert in experts.items():
        if base.folder is None or folder is None or expert.folder is None:
            continue
        for text in (
            _tokens_differ(folder, expert.folder, tokens, whose),
            _templates_differ(template, expert.folder, whose),
            _generation_differs(base.folder, expert.folder),
        ):
            if text:
                owners.setdefault(text, []).append(name)
    return [
        f"expert{'s' * (len(names) > 1)} {', '.join(names)}: {text}"
        for text, names in owners.items()
    ]


Tokens = tuple[dict[str, int], dict[str, int]]
"""The vocabulary, as far as JSON tells it, and the tokens that were added to it, with numbers."""


def _tokens_differ(
    ours: Path, expert: Path, tokens: Callable[[Path], Tokens], whose: str
) -> str | None:
    if all(_same(ours / x, expert / x) for x in ("tokenizer.json", "added_tokens.json")):
        return None
    (own, added), (theirs, more) = tokens(ours), tokens(expert)
    new = more.keys() - added.keys() - own.keys() if own or added else set()
    new |= theirs.keys() - own.keys() - added.keys() if own else set()
    if not new:
        return None
    some = ", ".join(sorted(new)[:3]) + ", …" * (len(new) > 3)
    return (
        f"the tokenizer has {len(new)} tokens that {whose}, which the merged model has, lacks "
        f"({some}); prompt the merged model without them, or give a base that has them"
    )


def token_ids(folder: Path) -> dict[str, int]:
    """Token -> its number, of all that JSON and text files tell of a folder's tokenizer."""
    vocabulary, added = _tokens(folder)
    return vocabulary | added


def _tokens(folder: Path) -> Tokens:
    content = json_of(folder / "tokenizer.json")
    model = content.get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, list):  # pairs of a word and its score, in the order of their numbers
        found = {x[0]: n for n, x in enumerate(found) if isinstance(x, list) and x}
    vocabulary = [*json_of(folder / "vocab.json").items(), *(found or {}).items()]
    added: list[tuple[Any, Any]] = [*json_of(folder / "added_tokens.json").items()]
    decoder = json_of(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and number.isdecimal():
            added.append((token.get("content"), int(number)))
    for token in content.get("added_tokens") or ():
        if isinstance(token, dict):
            added.append((token.get("content"), token.get("id")))
    return _numbered(vocabulary), _numbered(added)


def _numbered(pairs: Iterable[tuple[Any, Any]]) -> dict[str, int]:
    return {x: number for x, number in pairs if isinstance(x, str) and isinstance(number, int)}


def _templates_differ(template: Any, expert: Path, whose: str) -> str | None:
    theirs = chat_template(expert)
    if theirs is None or theirs == template:
        return None
    return (
        f"the chat template is not {whose}, which the merged model has; prompt the merged model "
        "by the one that its experts were trained with, or take it by processor"
    )


def _generation_differs(base: Path, expert: Path) -> str | None:
    ours, theirs = (json_of(folder / "generation_config.json") for folder in (base, expert))
    if not theirs:
        return None
    changed = []
    for key, default in GENERATION.items():
        own, base_own = (default if x.get(key) is None else x[key] for x in (theirs, ours))
        changed += [f"{key} {own} (the base {base_own})"] * (own != base_own)
    if not changed:
        return None
    return (
        f"generation_config.json has {', '.join(changed)}; the merged model has the base's settings"
    )


def _same(one: Path, other: Path) -> bool:
    """Whether two files have the same content, or neither is there."""
    try:
        return one.read_bytes() == other.read_bytes()
    except OSError:
        return not (one.exists() or other.exists())
