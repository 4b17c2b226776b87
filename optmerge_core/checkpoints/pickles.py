"""Pickled weights (`pytorch_model.bin`) as plain tensors, or refused.

A pickle is a program that builds what it holds. `torch.load` with `weights_only=True` runs none of
it: it builds tensors and plain containers, and refuses all else.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optmerge_core.checkpoints.formats import STORED_DTYPES, CheckpointError, Entry

REMEDY = "convert the model to safetensors with from_pretrained(...).save_pretrained(...)"
KEPT_BYTES = 256_000_000


class Pickle:
    """A pickled state dict, name -> tensor.

    A file as torch has written it since version 1.6 (a zip archive) is mapped, and mapped anew
    after every 256 MB read, so that no more of it stays in memory; an older one is loaded whole.
    Raises `CheckpointError` for a file that would run code, is damaged, or holds anything else.
    """

    def __init__(self, path: Path):
        self.path = path
        self._mapped = zipfile.is_zipfile(path)
        self._state, self._bytes_read = self._load(), 0

    def header(self) -> list[Entry]:
        """Name, shape, dtype of each tensor, sorted by name; torch knows where it lies."""
        state = self._state
        if not isinstance(state, dict) or not state:
            raise CheckpointError(f"{self.path}: not a state dict (name -> tensor); {REMEDY}")
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"{self.path}: {name!r} is a {type(tensor).__name__}, not a tensor, as in a "
                    f"training checkpoint; save the model's weights alone, or {REMEDY}"
                )
            if tensor.layout != torch.strided or tensor.dtype not in STORED_DTYPES.values():
                raise CheckpointError(
                    f"{self.path}: {name!r} is {tensor.layout} {tensor.dtype}, which is not "
                    f"supported; {REMEDY}"
                )
        return [(name, tuple(t.shape), t.dtype, 0) for name, t in sorted(state.items())]

    def read(self, name: str) -> Tensor:
        if self._mapped and self._bytes_read > KEPT_BYTES:
            self._state, self._bytes_read = self._load(), 0
        # A copy: two names may have one memory here (a tied head), and no two can in safetensors.
        tensor: Tensor = self._state[name].detach()
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._bytes_read += tensor.nbytes
        return tensor

    def _load(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except Exception as error:  # of any type: a damaged pickle makes the reader stumble anyhow
            if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise CheckpointError(
                    f"{self.path}: this pickle asks for {forbidden[1]}, which is more than weights "
                    "and was not run; do not trust it, or, where you know who made it, load the "
                    "model there and save it as safetensors with save_pretrained(...)"
                ) from error
            raise CheckpointError(
                f"{self.path}: truncated, or not a pickle of weights alone "
                f"({type(error).__name__}); download or copy it again, or {REMEDY}"
            ) from error
