"""Exercises of the notebooks, checked: right, or the next hint.

What counts as right is in notebooks/exercises/exercises.yaml as hashes, so that nobody reads an
answer by accident; the solutions beside it say how it is found.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from optmerge_core.places import checkout

PAGE = "notebooks/exercises/exercises.yaml"
TRIES: Counter[tuple[int, int]] = Counter()
"""Wrong answers given so far in this session, which decide the next hint."""


@dataclass(frozen=True)
class Check:
    """What was said of an answer; true if it is right. A notebook shows the text."""

    right: bool
    text: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return self.text


def check_exercise(notebook: int, exercise: int, answer: Any = None) -> Check:
    """Whether an answer is right, and if not, the next hint; without one, what is asked for.

    notebook, exercise: their numbers, (3, 2) for exercise 2 of notebook 03. answer: a word, several
    of them, or a number, as the question says. An answer of another form costs no hint. Raises
    `ValueError` for an exercise that there is not.
    """
    entry = _entry(notebook, exercise)
    if answer is None:
        return Check(False, f"{entry['asks']} ({_form(entry)})")
    try:
        given = hash_of(notebook, exercise, answer, entry.get("step"), entry.get("words", 1))
    except (TypeError, ValueError, OverflowError):
        return Check(False, f"{answer!r}: this takes {_form(entry)}. {entry['asks']}")
    if given in entry["right"]:
        return Check(True, f"Right. {entry['good']}")
    TRIES[notebook, exercise] += 1
    hints = entry["hints"]
    for near in entry.get("near", []):
        if given in near["hashes"]:
            return Check(False, f"Not yet. {near['hint']}")
    number = min(TRIES[notebook, exercise], len(hints))
    last = f" (The last hint; notebooks/exercises/{notebook:02}_solutions.ipynb has a solution.)"
    return Check(False, f"Not yet. {hints[number - 1]}{last if number == len(hints) else ''}")


def hash_of(
    notebook: int, exercise: int, answer: Any, step: float | None = None, words: int = 1
) -> str:
    """An answer as the page has it: what it says, however it is written, and hashed.

    A number counts in whole steps, rounded. Words are compared without case, spaces and signs,
    several of them in their order. Raises `ValueError` or `TypeError` for another form.
    """
    if step is None:
        given = [answer] if isinstance(answer, str) else list(answer)
        plain = [re.sub(r"[\W_]", "", str(word)).casefold() for word in given]
        if len(plain) != words or not all(plain):
            raise ValueError(f"not {words} words")
        text = "/".join(plain)
    else:
        text = str(math.floor(float(answer) / step + 0.5))
    return hashlib.sha256(f"{notebook}.{exercise}: {text}".encode()).hexdigest()[:16]


def _form(entry: Mapping[str, Any]) -> str:
    if "step" in entry:
        return "a number"
    return "a word" if entry.get("words", 1) == 1 else f"{entry['words']} words in a list"


@cache
def _page() -> dict[tuple[int, int], dict[str, Any]]:
    entries = yaml.safe_load((checkout() / PAGE).read_text(encoding="utf-8"))
    return {(entry["notebook"], entry["exercise"]): entry for entry in entries}


def _entry(notebook: int, exercise: int) -> dict[str, Any]:
    page = _page()
    if (notebook, exercise) in page:
        return page[notebook, exercise]
    there = [e for n, e in page if n == notebook]
    if not there:
        numbers = [n for n, _ in page]
        raise ValueError(f"notebook {notebook}: there are {min(numbers)} to {max(numbers)}")
    raise ValueError(f"exercise {exercise}: notebook {notebook} has {min(there)} to {max(there)}")
