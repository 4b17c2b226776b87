"""Files of a merge that is done in parts: one a part, whole or not there, beside the output."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.writer import explained, sync


def part_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.safetensors"


def write_part(folder: Path, number: int, tensors: Mapping[str, Tensor], notes: Any) -> Path:
    """Tensors and notes (JSON) as one file that appears at once; who writes it last has written it.

    Raises `CheckpointError` where the disk refuses.
    """
    path = part_file(folder, number)
    partial = folder / f".{path.name}.{secrets.token_hex(4)}"
    try:
        with explained(path):
            folder.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), partial, {"format": "pt", "notes": json.dumps(notes)})
            sync(partial)
            os.replace(partial, path)
            sync(folder)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_part(folder: Path, number: int, names: Iterable[str]) -> tuple[dict[str, Tensor], Any]:
    """These tensors, mapped from the file, read when used, and notes. Raises `CheckpointError`."""
    path = part_file(folder, number)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
            return tensors, json.loads(file.metadata()["notes"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a finished part ({error}); remove it and merge the part again"
        ) from error


def remove_parts(folder: Path) -> None:
    """All parts of one plan, and the folder of parts if no other plan has any there."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()
