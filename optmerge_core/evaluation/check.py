"""Whether a merged model works, and what its folder then says of that.

`merge` itself never loads a model: this is done afterwards, by the command or by whoever calls
`check_merged`. Nothing here imports transformers before it is known that a model can be opened.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from optmerge_core.checkpoints.formats import read_json
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.errors import MissingExtra
from optmerge_core.runtime import parse_device

ROOM = 1.2
"""Memory that a loaded model takes with one prompt's activations, over its weights' bytes."""


@dataclass
class Check:
    """What was seen of a merged folder; None is not seen, for which `not_checked` has the reason.

    Norms are relative to those of the logits of the adapters, merged into one and applied to the
    base by PEFT.
    """

    model_class: str | None = None
    device: str | None = None
    dtype: str | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    logits_finite: bool | None = None
    answer: str | None = None
    """greedy, to the fixed question"""
    adapter_difference: float | None = None
    """of the folder's logits from the adapter's"""
    adapter_rounding: float | None = None
    """what rounding the adapted weights to the folder's dtype changes"""
    failed: list[str] = field(default_factory=list)
    """a sentence each, with the likely cause"""
    not_checked: list[str] = field(default_factory=list)
    """what was not looked at, and why"""
    seconds: float = 0.0

    def sentences(self) -> list[str]:
        """What a reader needs to know, failures first."""
        seen = []
        if self.model_class:
            seen.append(f"the folder opens as {self.model_class} ({self.dtype}, {self.device})")
        if self.prompt_tokens is not None:
            images = f", {self.image_tokens} of them the image's" if self.image_tokens else ""
            seen.append(f"a prompt by its chat template has {self.prompt_tokens} tokens{images}")
        if self.logits_finite:
            seen.append("the logits are finite")
        if self.answer is not None:
            seen.append(f"its greedy answer begins {self.answer!r}")
        if self.adapter_difference is not None:
            seen.append(
                "the adapters, merged into one and applied to the base, give its logits but for "
                f"{self.adapter_difference:.1e} of their norm (rounding alone: "
                f"{self.adapter_rounding:.1e})"
            )
        found = [f"Failed: {text}." for text in self.failed]
        found += [f"Seen to work: {'; '.join(seen)}."] if seen else []
        return found + [f"Not checked: {text}." for text in self.not_checked]


def check_merged(
    folder: str | Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    model_class: Any = None,
) -> Check:
    """See whether a merged folder works, and write that into its report and card.

    It opens, as the class that config.json names or as `model_class`; a prompt through its own chat
    template is not empty and holds the image's tokens; logits are finite; a greedy answer is given.
    Where all experts are adapters, these applied to the base give the same logits, within the
    rounding of the dtype. A model that does not fit into the memory that is free, whose class is
    not there, or is Python code of its own (but with `trust_remote_code`) is not loaded.

    Takes seconds for the import of transformers, and the reading of all weights. Raises
    `ValueError` for what is no model's folder.
    """
    folder, started, check = Path(folder), time.perf_counter(), Check()
    weights = open_checkpoint(folder)
    needed = ROOM * sum(weights.nbytes(name) for name in weights)
    report = folder / "merge_report.json"
    said = read_json(report) if report.is_file() else {}
    chosen = _device(device, needed)
    if isinstance(chosen, str):
        check.not_checked.append(f"the model, {chosen}")
    else:
        try:
            from optmerge_core.evaluation import trial  # slow: transformers

            trial.run(check, weights, said, chosen, trust_remote_code, model_class)
        except MissingExtra as error:
            check.not_checked.append(f"the model, {error}")
    check.seconds = time.perf_counter() - started
    record(folder, check)
    return check


def _device(device: str, needed: float) -> torch.device | str:
    """Where so many bytes fit, a GPU that is asked for or the CPU; or why nowhere."""
    chosen, free = parse_device(device), psutil.virtual_memory().available
    if free <= needed:  # a GPU's is loaded here first
        return f"which takes {needed / 1e9:.1f} GB where {free / 1e9:.1f} GB of memory are free"
    on_gpu = chosen.type == "cuda" and torch.cuda.mem_get_info(chosen)[0] > needed
    return chosen if on_gpu else torch.device("cpu")


def record(folder: Path, check: Check) -> None:
    """Write a check into `merge_report.json` and the card, in the place of an earlier one's."""
    path = folder / "merge_report.json"
    if path.is_file():
        content = asdict(check)
        content |= {k: str(x) for k, x in content.items() if isinstance(x, float) and x != x}
        _replace(path, json.dumps(read_json(path) | {"check": content}, indent=2) + "\n")
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        lines = "\n".join(f"- {_plain(sentence)}" for sentence in check.sentences())
        own = re.compile(r"(?:## Check\n.*?)?(?=^## Load$)", re.DOTALL | re.MULTILINE)
        _replace(card, own.sub(lambda _: f"## Check\n\n{lines}\n\n", text, count=1))


def _plain(sentence: str) -> str:
    """A sentence in one line, in which a model's answer is no markup."""
    return re.sub(r"([<>`*_#\[\]|])", r"\\\1", " ".join(sentence.split()))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
