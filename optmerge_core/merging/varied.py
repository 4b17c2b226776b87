"""Options that differ by layer and by parameter, mergekit's gradients and filters, as plain data.

In a method's options, a value or one expert's in a list of them may be *varied*: a list of mappings

    [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": 0.3}, {"value": 1}]

The first one counts whose `filter` is a part of the parameter's name; "*", or none, is part of any.
A list as `value` is a gradient. Its entries lie evenly from the first layer to the last, and a
layer has what lies at its place: numbers are interpolated, of all else the entry before counts. A
layer's number is the first in the parameter's name. What stands before it names the stack that the
layer belongs to, so that language model and towers have gradients of their own; how many layers a
stack has, the base's names tell. A stack of one layer has the last entry, and what is in no stack,
as embeddings, heads and the last norm, the first: these are mergekit's rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LAMBDA = "lambda"
"""The option that all methods have if it is varied: times it, a parameter's scaling coefficient."""

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_NOTHING = object()


def is_varied(value: Any) -> bool:
    """Whether a value is a list of mappings with `value` in them."""
    listed = isinstance(value, list | tuple) and len(value) > 0
    return listed and all(isinstance(entry, Mapping) and "value" in entry for entry in value)


def varied(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(option, varied value) for all that there are."""
    found = []
    for key, value in options.items():
        entries = value if isinstance(value, list | tuple) and not is_varied(value) else [value]
        found += [(key, entry) for entry in entries if is_varied(entry)]
    return found


class Settings:
    """The options of a method and λ for each parameter of a base that has these names.

    Raises `ValueError` for what is no varied value: see `check_form`.
    """

    def __init__(self, options: Mapping[str, Any], names: Iterable[str] = ()):
        check_form(options)
        self.options = {key: value for key, value in options.items() if key != LAMBDA}
        self.scaling = options.get(LAMBDA, 1.0)
        self.vary = bool(varied(options))
        self.layers = stacks(names) if self.vary else {}

    def of(self, name: str) -> tuple[dict[str, Any], float]:
        """Options and λ of a parameter. `ValueError` if an expert's value is said of others only.

        An option that is said of others only has its default.
        """
        if not self.vary:
            return dict(self.options), self.scaling
        stack, number = layer_of(name)
        last = self.layers.get(stack, 0) - 1
        return self.at(name, 0.0 if number is None else number / last if last > 0 else 1.0)

    def at(self, name: str, place: float) -> tuple[dict[str, Any], float]:
        """The same at a place between the first layer of a stack, 0, and the last, 1."""
        options = {}
        for key, value in self.options.items():
            found = _value(value, name, place)
            if isinstance(found, list | tuple):
                found = [_value(entry, name, place) for entry in found]
                if _NOTHING in found:
                    raise ValueError(
                        f"{key}: expert {found.index(_NOTHING) + 1} of {len(found)} has none for "
                        f"{name}; add one without filter"
                    )
            if found is not _NOTHING:
                options[key] = found
        scaling = _value(self.scaling, name, place)
        return options, 1.0 if scaling is _NOTHING else scaling

    def examples(self) -> Iterator[dict[str, Any]]:
        """The options at each entry of their gradients; none where filters ask for names."""
        entries = [entry for _, value in varied(self.options) for entry in value]
        places = {0.0: None}
        for entry in entries:
            last = len(entry["value"]) - 1 if isinstance(entry["value"], list | tuple) else 0
            places |= {number / last: None for number in range(last + 1) if last}
        if all(entry.get("filter", "*") == "*" for entry in entries):
            yield from (self.at("", place)[0] for place in places)


def check_form(options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for entries of a varied value that are not as above, and for a plain λ."""
    for key, value in varied(options):
        for entry in value:
            own = entry["value"]
            leaves = own if isinstance(own, list | tuple) else [own]
            if entry.keys() - {"filter", "value"} or not isinstance(entry.get("filter", ""), str):
                raise ValueError(f"{key} {dict(entry)}: filter, a text, and value are expected")
            if not leaves or any(isinstance(leaf, list | tuple) for leaf in leaves):
                raise ValueError(f"{key} {dict(entry)}: give one value, or a list for the layers")
            for leaf in leaves if key == LAMBDA else ():
                number(key, leaf)
    if LAMBDA in options and not is_varied(options[LAMBDA]):
        raise ValueError(f"lambda {options[LAMBDA]!r}: one for all is the scaling coefficient")


def number(key: str, value: Any) -> float:
    """The value itself; a `ValueError` unless it is one finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} {value!r}: one finite number is expected")
    return value


def stacks(names: Iterable[str]) -> dict[str, int]:
    """What the names of a stack's parameters begin with -> how many layers it has."""
    found: dict[str, int] = {}
    for stack, number in map(layer_of, names):
        if number is not None:
            found[stack] = max(found.get(stack, 0), number + 1)
    return found


def layer_of(name: str) -> tuple[str, int | None]:
    """The stack of a parameter and its number in it; None of what is in none."""
    found = _NUMBER.search(name)
    return (name[: found.start()], int(found[1])) if found else (name, None)


def _value(value: Any, name: str, place: float) -> Any:
    """A value of an option at a parameter; `_NOTHING` where it is said of others only."""
    if not is_varied(value):
        return value
    for entry in value:
        if entry.get("filter", "*") == "*" or entry["filter"] in name:
            return _between(entry["value"], place)
    return _NOTHING


def _between(value: Any, place: float) -> Any:
    """What a gradient has at a place from 0 to 1; any other value everywhere."""
    if not isinstance(value, list | tuple):
        return value
    at = place * (len(value) - 1)
    start = int(at)
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
    if at == start or not numbers:
        return value[start]
    return (1 - (at - start)) * value[start] + (at - start) * value[start + 1]
