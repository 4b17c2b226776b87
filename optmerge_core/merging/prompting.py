"""What a model is prompted and generates by, where an expert's is not the base's.

The merged model has the base's tokenizer, chat template and generation settings. An expert that was
trained with others may do less well in it, which nothing else shows: each is worth a notice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from optmerge_core.checkpoints.weights import Weights

GENERATION = {
    **{"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None},
    **{"typical_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1},
    **{"length_penalty": 1.0, "max_length": None, "max_new_tokens": None},
}
"""What decides an answer in generation_config.json, and transformers' default of each."""


def differences(base: Weights, experts: Mapping[str, Weights]) -> list[str]:
    """A sentence for each way in which experts (name -> weights) are prompted otherwise."""
    owners: dict[str, list[str]] = {}
    tokens = cache(_tokens)  # a large file, of the base the same each time
    for name, expert in experts.items():
        if base.folder is None or expert.folder is None:
            continue
        for text in (
            _tokens_differ(base.folder, expert.folder, tokens),
            _templates_differ(base.folder, expert.folder),
            _generation_differs(base.folder, expert.folder),
        ):
            if text:
                owners.setdefault(text, []).append(name)
    return [
        f"expert{'s' * (len(names) > 1)} {', '.join(names)}: {text}"
        for text, names in owners.items()
    ]


Tokens = tuple[set[str], set[str]]
"""The vocabulary, as far as JSON tells it, and the tokens that were added to it."""


def _tokens_differ(base: Path, expert: Path, tokens: Callable[[Path], Tokens]) -> str | None:
    if all(_same(base / x, expert / x) for x in ("tokenizer.json", "added_tokens.json")):
        return None
    (ours, added), (theirs, more) = tokens(base), tokens(expert)
    new = more - added - ours if ours or added else set()
    new |= theirs - ours - added if ours else set()
    if not new:
        return None
    some = ", ".join(sorted(new)[:3]) + ", …" * (len(new) > 3)
    return (
        f"the tokenizer has {len(new)} tokens that the base's, which the merged model has, lacks "
        f"({some}); prompt the merged model without them, or give a base that has them"
    )


def _tokens(folder: Path) -> Tokens:
    content = _json(folder / "tokenizer.json")
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    words = [x[0] if isinstance(x, list) and x else x for x in vocabulary or ()]
    added = [x.get("content") for x in content.get("added_tokens") or () if isinstance(x, dict)]
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(decoder, dict):
        added += [x.get("content") for x in decoder.values() if isinstance(x, dict)]
    return (
        {word for word in [*words, *_json(folder / "vocab.json")] if isinstance(word, str)},
        {token for token in [*added, *_json(folder / "added_tokens.json")] if token},
    )


def _templates_differ(base: Path, expert: Path) -> str | None:
    theirs = _template(expert)
    if theirs is None or theirs == _template(base):
        return None
    return (
        "the chat template is not the base's, which the merged model has; prompt the merged model "
        "by the one that its experts were trained with"
    )


def _template(folder: Path) -> Any:
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        for name in ("chat_template.json", "tokenizer_config.json"):
            if (template := _json(folder / name).get("chat_template")) is not None:
                return template.strip() if isinstance(template, str) else template
    return None


def _generation_differs(base: Path, expert: Path) -> str | None:
    ours, theirs = (_json(folder / "generation_config.json") for folder in (base, expert))
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


def _json(path: Path) -> dict[str, Any]:
    """A file's mapping; an empty one for any other content, which no merge hangs on."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
