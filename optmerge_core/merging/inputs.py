"""Inputs of a planned merge as plain data: where they are, and whether they are what they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optmerge_core.checkpoints.formats import CheckpointError, dtype_name
from optmerge_core.checkpoints.weights import Weights


def described(location: Any, weights: Weights) -> dict[str, Any]:
    """What a plan says of base model or expert; `MergePlan.base_model` explains it."""
    given = isinstance(location, str | Path)
    folder = weights.folder if given and weights.source == "folder" else None
    return {
        "location": str(location) if given else type(location).__name__,
        "folder": str(folder.resolve()) if folder else None,
        "revision": weights.revision,
        "source": weights.source,
        "files": _files(weights),
        "headers": _headers(weights),
    }


def opened_from(item: Mapping[str, Any]) -> str:
    """Where a planned input is opened again: its folder, or its address, pinned."""
    location = item["folder"] or item["location"]
    return f"{location.partition('@')[0]}@{item['revision']}" if item["revision"] else location


def check_same(item: Mapping[str, Any], weights: Weights) -> None:
    """Raise `CheckpointError` if an input has changed since it was `described`."""
    for what, found in (("files", _files(weights)), ("headers", _headers(weights))):
        if found != item[what]:
            raise CheckpointError(
                f"{item['location']}: its {what} ({found}) are not those that the merge was "
                f"planned for ({item[what]}); plan the merge again"
            )


def _files(weights: Weights) -> dict[str, list[int | None]]:
    """File -> [bytes, seconds of its last change]; the latter only of what nothing else pins."""
    folder = weights.folder if weights.source == "folder" else None
    try:
        return {
            name: [size, int((folder / name).stat().st_mtime) if folder else None]
            for name, size in weights.file_sizes().items()
        }
    except OSError as error:
        raise CheckpointError(
            f"{weights.folder}: a file is gone ({error}); copy it again"
        ) from error


def _headers(weights: Weights) -> str:
    """A hash of names, shapes, dtypes and config.json, and of the versions that a server tells."""
    told = weights.sha256() if weights.streamed(()) else {}
    stored = [[name, weights.shape(name), dtype_name(weights.dtype(name))] for name in weights]
    text = json.dumps([stored, weights.config(), told], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
