"""mergekit's ways to write a value, for all, by layer or by filter, in `merging.varied`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from optmerge_core.merging.varied import is_varied, number

Check = Callable[[str, Any], Any]


def value_of(key: str, said: Iterable[Any], default: Any = None, check: Check = number) -> Any:
    """The value of a key: one, or a varied one; None where nothing is said of it.

    said: what a file says in several places (None: nothing), the first counts. What the filters of
    one leave out is looked for in the next, and is then `default`, unless that is None.
    `check(key, value)` raises `ValueError` for a value that is none.
    """
    found: list[dict[str, Any]] = []
    for entry in (entry for own in said if own is not None for entry in _entries(key, own, check)):
        found.append(entry)
        if "filter" not in entry:
            break
    else:
        if found and default is not None:
            found.append({"value": default})
    if not found:
        return None
    one = found[0]["value"]
    return one if "filter" not in found[0] and not isinstance(one, list) else found


def flag(key: str, value: Any) -> Any:
    """The value itself, which has to be true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{key} {value!r}: true or false is expected")
    return value


def anything(_key: str, value: Any) -> Any:
    """The value itself."""
    return value


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value, in a varied one each of its values, as `change` makes it."""
    if is_varied(value):
        return [entry | {"value": mapped(entry["value"], change)} for entry in value]
    return [change(one) for one in value] if isinstance(value, list) else change(value)


def leaves(value: Any) -> list[Any]:
    """All that a value may be."""
    found: list[Any] = []
    mapped(value, found.append)
    return found


def _entries(key: str, said: Any, check: Check) -> list[dict[str, Any]]:
    """One setting of a file as entries of a varied value, which filter by no text that all have."""
    listed = said if isinstance(said, list) and any(isinstance(x, dict) for x in said) else [said]
    entries = []
    for entry in listed:
        if not (isinstance(entry, Mapping) and "value" in entry):
            if listed is said:
                raise ValueError(f"{key} {entry!r}: filter and value are expected")
            entry = {"value": entry}
        if unknown := entry.keys() - {"filter", "value"}:
            raise ValueError(f"{key}: {min(map(str, unknown))} is neither filter nor value")
        values = entry["value"] if isinstance(entry["value"], list) else [entry["value"]]
        if not values:
            raise ValueError(f"{key} []: give at least one value")
        for value in values:
            check(key, value)
        text = entry.get("filter")
        entries.append(
            ({} if text in (None, "*") else {"filter": str(text)}) | {"value": entry["value"]}
        )
    return entries
