"""Hugging Face checkpoint folders as lazy mappings parameter name -> tensor.

Only safetensors files are read; pickled weights are refused, since unpickling executes what the
file says. `writer.py` writes such folders.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names the file and the remedy."""


class Checkpoint(Mapping[str, Tensor]):
    """A folder of safetensors files as a read-only mapping parameter name -> CPU tensor.

    Opening reads the headers only. Indexing reads one tensor, in the dtype of the file, through a
    memory map that lives as long as the tensor, so a loop over a checkpoint of any size holds one
    tensor at a time. Names iterate file by file and sorted within a file.

    With `adapter`, a folder of a PEFT adapter opens too, as what it is: the adapter's own tensors.
    Raises `CheckpointError` when the folder is not a complete, consistent safetensors checkpoint.
    """

    def __init__(self, folder: str | Path, revision: str | None = None, adapter: bool = False):
        self.folder = Path(folder)
        self.revision = revision
        self.files, index = _weight_files(self.folder, adapter)
        self._entries: dict[str, tuple[Path, tuple[int, ...], torch.dtype]] = {}
        self._sha256: dict[str, str] = {}
        for file in self.files:
            for name, shape, dtype in _read_header(file):
                if name in self._entries:
                    raise CheckpointError(
                        f"{file}: tensor {name!r} is also in {self._entries[name][0].name}; "
                        "remove the shard that does not belong to this checkpoint"
                    )
                self._entries[name] = (file, shape, dtype)
        for name, file in index.items():
            if name not in self._entries or self._entries[name][0] != file:
                raise CheckpointError(
                    f"{self.folder / INDEX_NAME}: tensor {name!r} is not in {file.name}, where the "
                    "index says it is; download or save the checkpoint again"
                )

    def __getitem__(self, name: str) -> Tensor:
        # One handle a tensor: the pages of a shared handle would stay in memory until it closes.
        with safe_open(self._entries[name][0], framework="pt") as handle:
            return handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}, {len(self)} tensors in {len(self.files)} files)"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, from the header: no weights are read."""
        return self._entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a parameter, from the header: no weights are read."""
        return self._entries[name][2]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters, from the headers."""
        return {name: shape for name, (_, shape, _) in self._entries.items()}

    def nbytes(self, name: str) -> int:
        """Bytes one parameter takes in the file."""
        _, shape, dtype = self._entries[name]
        return torch.Size(shape).numel() * dtype.itemsize

    def config(self) -> dict:
        """The folder's config.json; an empty dict where there is none."""
        path = self.folder / "config.json"
        return read_json(path) if path.is_file() else {}

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 of each weight file. Reads every file once; kept afterwards."""
        if not self._sha256:
            for path in self.files:
                with open(path, "rb") as stream:
                    self._sha256[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return dict(self._sha256)


def open_checkpoint(
    folder_or_hub_id: str | Path, revision: str | None = None, adapter: bool = False
) -> Checkpoint:
    """Open a local folder, or else a Hugging Face hub id (`owner/name`, downloaded to the cache).

    From the hub only safetensors and side files are fetched. `revision` (branch, tag or commit) is
    for hub ids. Raises `CheckpointError` if neither can be opened.
    """
    folder = Path(folder_or_hub_id).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{folder} is a local folder: revision is for hub ids only")
        return Checkpoint(folder, adapter=adapter)
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the checkpoint's folder")
    if not HUB_ID.fullmatch(str(folder_or_hub_id)):
        raise CheckpointError(f"{folder_or_hub_id}: no such folder, nor a hub id (owner/name)")

    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(str(folder_or_hub_id), revision=revision, allow_patterns=HUB_PATTERNS)
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder_or_hub_id}: no such folder, and the hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check name and network"
        ) from error
    return Checkpoint(folder, revision=folder.name, adapter=adapter)


def _weight_files(folder: Path, adapter: bool) -> tuple[list[Path], dict[str, Path]]:
    """The safetensors files of a folder and the index to check them against, if it has one.

    In transformers' order: the single file, the files of the index, whatever else is there.
    """
    for single in (SINGLE_NAME, *([ADAPTER_NAME] if adapter else [])):
        if (folder / single).is_file():
            return [folder / single], {}
    index = _read_index(folder)
    files = sorted(set(index.values())) or sorted(folder.glob("*.safetensors"))
    for path in files:
        if path.name == ADAPTER_NAME:
            raise CheckpointError(f"{folder} is a PEFT adapter, where a whole model is needed")
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing shard, named in {INDEX_NAME}; download or copy it again"
            )
    if not files:
        pickles = [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        found = f"only pickles ({pickles[0].name}), which are not loaded" if pickles else "nor any"
        raise CheckpointError(
            f"{folder}: no safetensors weights, {found}; convert the model to safetensors with "
            "from_pretrained(...).save_pretrained(...)"
        )
    return files, index


def _read_index(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index; empty where there is none."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map in the index; save the checkpoint again")
    for name, file in weight_map.items():
        # A name, not a resolved path, is checked: the hub's cache is made of links to elsewhere.
        if (
            not isinstance(file, str)
            or not file.endswith(".safetensors")
            or (PurePosixPath(file).name != file or PureWindowsPath(file).name != file)
        ):
            raise CheckpointError(
                f"{path}: tensor {name!r} points to {file!r}, which is not a safetensors file of "
                "this folder; do not trust this checkpoint"
            )
    return {name: folder / file for name, file in weight_map.items()}


def _read_header(path: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    try:
        with safe_open(path, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in sorted(handle.keys())}
            return [
                (name, tuple(part.get_shape()), DTYPES[part.get_dtype()])
                for name, part in slices.items()
            ]
    except KeyError as error:
        raise CheckpointError(f"{path}: dtype {error} is not supported") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated or not a safetensors file ({error}); download or copy it again"
        ) from error


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object is expected; download it again")
    return content
