"""Hugging Face checkpoint folders as lazy mappings parameter name -> tensor.

Weights are safetensors files; where there are none, pickles that hold plain tensors (`pickles.py`).
`remote.py` reads a checkpoint over the network without downloading it, `writer.py` writes one.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Collection
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optmerge_core.checkpoints import URL
from optmerge_core.checkpoints.formats import (
    ADAPTER_CONFIG,
    CheckpointError,
    Entry,
    read_header,
    read_json,
    weight_files,
)
from optmerge_core.checkpoints.names import PREFIX, unwrapped
from optmerge_core.checkpoints.pickles import Pickle
from optmerge_core.checkpoints.weights import Weights

PIECE = 1 << 20  # bytes that are hashed at a time: fits a core's cache


class Digest:
    """The SHA-256 of a file, taken from its beginning piece by piece, by any threads."""

    def __init__(self, path: Path):
        self.path, self._hash, self._bytes, self._lock = path, hashlib.sha256(), 0, Lock()

    def advance(self, end: int) -> None:
        """Go on up to a byte of the file, unless another thread is at it."""
        if self._lock.acquire(blocking=False):
            try:
                self._hash_to(end)
            finally:
                self._lock.release()

    def finish(self) -> str:
        """Go on to the end: the digest in hexadecimal."""
        with self._lock:
            self._hash_to(sys.maxsize)
            return self._hash.hexdigest()

    def _hash_to(self, end: int) -> None:
        if self._bytes >= end:
            return
        piece = memoryview(bytearray(PIECE))
        with open(self.path, "rb", buffering=0) as stream:
            stream.seek(self._bytes)
            while self._bytes < end and (count := stream.readinto(piece)):
                self._hash.update(piece[:count])
                self._bytes += count


class Checkpoint(Weights):
    """A folder of weight files as a read-only mapping parameter name -> CPU tensor.

    Opening reads the headers only. Indexing reads one tensor, in the dtype of the file, through a
    memory map that lives as long as the tensor, so a loop over a checkpoint of any size holds one
    tensor at a time. Names iterate file by file and sorted within a file.

    With `adapter`, a folder of a PEFT adapter opens too, as what it is: the adapter's own tensors.
    Raises `CheckpointError` when the folder is not a complete, consistent checkpoint of tensors.
    """

    folder: Path
    source: str

    def __init__(self, folder: str | Path, revision: str | None = None, adapter: bool = False):
        self.folder, self.revision = Path(folder), revision
        self.source = "hub" if revision else "folder"
        self._pickles: dict[str, Pickle] = {}
        present = {path.name for path in self.folder.iterdir() if path.is_file()}
        self._read_headers(str(self.folder), present, adapter)

    def _read_headers(self, place: str, present: Collection[str], adapter: bool) -> None:
        """`present`: the files there; `place`: what error messages call their folder."""
        names, index = weight_files(place, self.folder, present, adapter)
        self.files = [self.folder / name for name in names]
        self._entries: dict[str, tuple[str, tuple[int, ...], torch.dtype, int]] = {}
        self._hashes = {path.name: Digest(path) for path in self.files}
        for file in names:
            for name, shape, dtype, start in self._read_header(file):
                if name in self._entries:
                    raise CheckpointError(
                        f"{place}/{file}: tensor {name!r} is also in {self._entries[name][0]}; "
                        "remove the shard that does not belong to this checkpoint"
                    )
                self._entries[name] = (file, shape, dtype, start)
        for name, file in index.items():
            if name not in self._entries or self._entries[name][0] != file:
                raise CheckpointError(
                    f"{place}: tensor {name!r} is not in {file}, where the index says it is; "
                    "download or save the checkpoint again"
                )
        empty = [n for n in self._entries if n.endswith("weight") and self._entries[n][1] == (0,)]
        if empty:
            raise CheckpointError(
                f"{place}: {len(empty)} of {len(self._entries)} tensors are empty ({empty[0]}), as "
                "DeepSpeed ZeRO-3 leaves them; gather them with zero_to_fp32.py, or save again "
                "with stage3_gather_16bit_weights_on_model_save"
            )
        if self.is_adapter:
            self._names = self._own = {name: name for name in self._entries}
            return
        self._names = self._own = plain_names(place, self._entries)
        if ADAPTER_CONFIG in present:
            warnings.warn(
                f"{place} holds an adapter ({ADAPTER_CONFIG}) beside whole weights, which are "
                "taken; to give the adapter, put it into a folder of its own",
                stacklevel=2,
            )

    def _read_header(self, file: str) -> list[Entry]:
        path = self.folder / file
        try:
            with open(path, "rb") as stream:
                if (first := stream.read(8)) == b"version ":
                    raise CheckpointError(f"{path}: Git LFS's pointer to it; run `git lfs pull`")
                if path.suffix == ".safetensors":
                    return read_header(first, stream.read, path.stat().st_size, str(path))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error
        self._pickles[file] = Pickle(path)
        return self._pickles[file].header()

    def __getitem__(self, name: str) -> Tensor:
        name = self._own[name]
        file = self._entries[name][0]
        if file in self._pickles:
            return self._pickles[file].read(name)
        # One handle a tensor: the pages of a shared handle would stay in memory until it closes.
        try:
            with safe_open(self.folder / file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name)
                return tensor
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.folder / file}: changed since it was opened ({error}); try again"
            ) from error

    def __repr__(self) -> str:
        kind, place = type(self).__name__, self.source if URL.match(self.source) else self.folder
        return f"{kind}({str(place)!r}, {len(self)} tensors in {len(self.files)} files)"

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are those of a PEFT adapter alone."""
        return [file.stem for file in self.files] == ["adapter_model"]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, from the header: no weights are read."""
        return self._entries[self._own[name]][1]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a parameter, from the header: no weights are read."""
        return self._entries[self._own[name]][2]

    def own_name(self, name: str) -> str:
        return self._own[name]

    def config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        kind, classes = config.get("model_type"), config.get("architectures") or []
        names = [kind] * (kind is not None) + (classes if isinstance(classes, list) else [None])
        if not all(isinstance(name, str) for name in names):
            raise CheckpointError(
                f"{path}: model_type is {kind!r} and architectures {classes!r}, where a text and a "
                "list of texts are expected; download it again"
            )
        return config

    def file_sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.files}

    def hash_beside(self, name: str) -> None:
        file, _, _, start = self._entries[self._own[name]]
        if file not in self._pickles:
            self._hashes[file].advance(start + self.nbytes(name))

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 of each weight file. Reads every file once; kept afterwards."""
        return {file: digest.finish() for file, digest in self._hashes.items()}


def plain_names(place: str, names: Collection[str]) -> dict[str, str]:
    """Name -> what it is called here, of a whole model without training's wrappers (`unwrapped`).

    Raises `CheckpointError` for a PEFT model's weights with the factors still beside them.
    """
    factors = [n for n in names if ".lora_" in n and (n.endswith(".default.weight") or PREFIX in n)]
    if factors:
        raise CheckpointError(
            f"{place} is a PEFT model with its adapter unmerged ({factors[0]}); give what "
            "merge_and_unload() makes of it, or the adapter as PEFT's save_pretrained(...) saves it"
        )
    own = {name: own for own, name in unwrapped(names).items()}
    if len(own) < len(names):
        raise CheckpointError(
            f"{place}: the same tensors with and without a wrapper's name; save the model again"
        )
    return own
