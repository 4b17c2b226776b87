"""Tokens of several specialists in one vocabulary, and their rows of the embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optmerge_core.checkpoints.names import EMBEDDINGS
from optmerge_core.omni.specialists import Specialist

TOKEN_ID = re.compile(r".+_token_(id|index)")
FEATURE = re.compile(r"(image|video|audio|speech|vision)_token_(id|index)")
"""of a placeholder in whose place a tower's features stand; other tokens are read as words"""


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


def _placeholders(config: Mapping[str, Any]) -> dict[str, int]:
    found = {k: v for k, v in config.items() if TOKEN_ID.fullmatch(k) and isinstance(v, int)}
    return {k: v for k, v in found.items() if not k.startswith(("pad", "bos", "eos"))}


def _features(specialist: Specialist) -> set[int]:
    """Tokens that are never read as words; without a tokenizer all that the config names."""
    named = _placeholders(specialist.config).items()
    return {n for key, n in named if FEATURE.fullmatch(key) or specialist.tokenizer is None}


def renumbered(config: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """A specialist's config with its modality tokens' numbers in the common vocabulary."""
    return dict(config) | {k: ids.get(v, v) for k, v in _placeholders(config).items()}


def check_tokens(opened: Mapping[str, Specialist], ids: Mapping[str, Mapping[int, int]]) -> None:
    """Refuse tokens that two kinds of input claim, or whose rows no specialist has."""
    _check_placeholders(opened, ids)
    _check_rows(opened, ids)


def _check_placeholders(
    opened: Mapping[str, Specialist], ids: Mapping[str, Mapping[int, int]]
) -> None:
    """Without tokenizers, two kinds of input may claim one token number."""
    owners: dict[int, tuple[str, str]] = {}
    for modality, specialist in opened.items():
        for key, number in _placeholders(renumbered(specialist.config, ids[modality])).items():
            kind = TOKEN_ID.sub("", key) or key.split("_token_")[0]
            other = owners.setdefault(number, (modality, kind))
            if other[1] != kind:
                raise ValueError(
                    f"{modality} uses token {number} for {key}, {other[0]} for {other[1]} input: "
                    "give specialists with tokenizers, so that their tokens can be renumbered"
                )


def _check_rows(opened: Mapping[str, Specialist], ids: Mapping[str, Mapping[int, int]]) -> None:
    """Refuse an added token of which no specialist has a row, unless features stand in its place.

    Its specialist cannot read it either (an index out of range); its row was not saved.
    """
    rows = {m: specialist.language_model.shape(EMBEDDINGS)[0] for m, specialist in opened.items()}
    known = {new for m, own in ids.items() for old, new in own.items() if old < rows[m]}
    for modality, specialist in opened.items():
        features, tokenizer = _features(specialist), specialist.tokenizer
        for old, new in ids[modality].items():
            if tokenizer and new not in known and old not in features:
                token = tokenizer.convert_ids_to_tokens(old)
                raise ValueError(
                    f"{modality}: its tokenizer adds {token!r}, number {old}, and its embeddings "
                    f"have {rows[modality]} rows, none for it; save it again with them (an adapter "
                    "with save_embedding_layers=True), or take the token out of its tokenizer"
                )


def with_added_rows(
    name: str,
    rows: Tensor,
    opened: Mapping[str, Specialist],
    ids: Mapping[str, Mapping[int, int]],
) -> Tensor:
    """Rows of added tokens after the base's, from the first specialist that has them.

    Zeros for a placeholder without any: features stand in its place. A specialist without a head
    of its own has it tied to its embeddings.
    """
    size = max([len(rows), *(1 + new for own in ids.values() for new in own.values())])
    table = torch.cat([rows, rows.new_zeros(size - len(rows), rows.shape[1])])
    filled: dict[int, str] = {}
    for modality, own in ids.items():
        specialist = opened[modality]
        language_model = specialist.language_model
        theirs = language_model[name if name in language_model else EMBEDDINGS]
        features = _features(specialist)
        for old, new in own.items():
            if old >= len(theirs) or (new in filled and old in features):
                continue
            row = theirs[old].to(table.dtype)
            if new in filled and not torch.equal(table[new], row):
                raise ValueError(
                    f"{name}: token {new} is trained in {filled[new]} and in {modality}, with "
                    "different values; rename it in one of the tokenizers"
                )
            table[new], filled[new] = row, modality
    return table
