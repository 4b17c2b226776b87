"""Hugging Face checkpoint folders as lazy mappings parameter name -> tensor.

Weights are safetensors files; where there are none, pickles that hold plain tensors (`pickles.py`).
`remote.py` reads a checkpoint over the network without downloading it, `writer.py` writes one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"
FORMATS = {
    ".safetensors": (SINGLE_NAME, ADAPTER_NAME, INDEX_NAME),
    ".bin": ("pytorch_model.bin", "adapter_model.bin", "pytorch_model.bin.index.json"),
}  # suffix -> names of a single file, of an adapter, of the index; in order of preference
SIDE_PATTERNS = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]
PICKLE_PATTERNS = ["pytorch_model*.bin", "adapter_model.bin"]
HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
URL = re.compile(r"https?://\S+", re.IGNORECASE)
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
    """A folder of weight files as a read-only mapping parameter name -> CPU tensor.

    Opening reads the headers only. Indexing reads one tensor, in the dtype of the file, through a
    memory map that lives as long as the tensor, so a loop over a checkpoint of any size holds one
    tensor at a time. Names iterate file by file and sorted within a file.

    With `adapter`, a folder of a PEFT adapter opens too, as what it is: the adapter's own tensors.
    `source` says where the weights are read: "folder", "hub" (its cache), or the address they are
    streamed from. Raises `CheckpointError` when the folder is not a complete, consistent checkpoint
    of tensors.
    """

    def __init__(self, folder: str | Path, revision: str | None = None, adapter: bool = False):
        self.folder, self.revision = Path(folder), revision
        self.source = "hub" if revision else "folder"
        self._pickles: dict[str, Any] = {}
        present = {path.name for path in self.folder.iterdir() if path.is_file()}
        self._read_headers(str(self.folder), present, adapter)

    def _read_headers(self, place: str, present: Collection[str], adapter: bool) -> None:
        """`present`: the files there; `place`: what error messages call their folder."""
        names, index = weight_files(place, self.folder, present, adapter)
        self.files = [self.folder / name for name in names]
        self._entries: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {}
        self._sha256: dict[str, str] = {}
        for file in names:
            for name, shape, dtype in self._read_header(file):
                if name in self._entries:
                    raise CheckpointError(
                        f"{place}/{file}: tensor {name!r} is also in {self._entries[name][0]}; "
                        "remove the shard that does not belong to this checkpoint"
                    )
                self._entries[name] = (file, shape, dtype)
        for name, file in index.items():
            if name not in self._entries or self._entries[name][0] != file:
                raise CheckpointError(
                    f"{place}: tensor {name!r} is not in {file}, where the index says it is; "
                    "download or save the checkpoint again"
                )

    def _read_header(self, file: str) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        path = self.folder / file
        if path.suffix == ".bin":
            from optmerge_core.pickles import Pickle

            self._pickles[file] = Pickle(path)
            return self._pickles[file].header()
        return _safetensors_header(path)

    def __getitem__(self, name: str) -> Tensor:
        file = self._entries[name][0]
        if file in self._pickles:
            return self._pickles[file].read(name)
        # One handle a tensor: the pages of a shared handle would stay in memory until it closes.
        try:
            with safe_open(self.folder / file, framework="pt") as handle:
                return handle.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.folder / file}: changed since it was opened ({error}); try again"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        kind, place = type(self).__name__, self.source if URL.match(self.source) else self.folder
        return f"{kind}({str(place)!r}, {len(self)} tensors in {len(self.files)} files)"

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are those of a PEFT adapter alone."""
        return [file.stem for file in self.files] == ["adapter_model"]

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
        config = read_json(path) if path.is_file() else {}
        kind, classes = config.get("model_type"), config.get("architectures") or []
        names = [kind] * (kind is not None) + (classes if isinstance(classes, list) else [None])
        if not all(isinstance(name, str) for name in names):
            raise CheckpointError(
                f"{path}: model_type is {kind!r} and architectures {classes!r}, where a text and a "
                "list of texts are expected; download it again"
            )
        return config

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 of each weight file. Reads every file once; kept afterwards."""
        if not self._sha256:
            for path in self.files:
                with open(path, "rb") as stream:
                    self._sha256[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return dict(self._sha256)


def open_checkpoint(
    location: str | Path, revision: str | None = None, adapter: bool = False, stream: bool = False
) -> Checkpoint:
    """Open a local folder, or else a Hugging Face hub id: `owner/name` or `owner/name@revision`.

    `revision` (branch, tag or commit) is for hub ids. What a model needs is downloaded to the hub's
    cache, once; in offline mode (HF_HUB_OFFLINE) it is taken from there. With `stream`, weights
    that the cache lacks stay on the hub and are read tensor by tensor, and `location` can also be
    the URL of a checkpoint's folder on a web server. Raises `CheckpointError`.
    """
    folder = Path(location).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{folder} is a local folder: revision is for hub ids only")
        return Checkpoint(folder, adapter=adapter)
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the checkpoint's folder")
    if URL.fullmatch(str(location)):
        if not stream or revision is not None:
            raise CheckpointError(
                f"{location}: a web server's folder has no revision and is not downloaded; stream "
                "it (stream=True, --stream), or download it and give the local folder"
            )
        from optmerge_core.remote import open_url

        return open_url(str(location), adapter)
    repo_id, revision = parse_hub_id(str(location), revision)
    from huggingface_hub import constants

    if stream and not constants.HF_HUB_OFFLINE:
        from optmerge_core.remote import open_hub

        return open_hub(repo_id, revision, adapter)
    return _open_cached(repo_id, revision, adapter)


def parse_hub_id(location: str, revision: str | None = None) -> tuple[str, str | None]:
    """`owner/name` or `owner/name@revision` as (id, revision); None is the hub's default branch.

    Raises `CheckpointError` for what is not a hub id, and where `revision` says otherwise.
    """
    match = HUB_ID.fullmatch(location)
    if match is None:
        raise CheckpointError(
            f"{location}: no such folder, nor a hub id (owner/name or owner/name@revision)"
        )
    if match["revision"] and revision not in (None, match["revision"]):
        raise CheckpointError(f"{location}: revision {revision!r} says otherwise; give only one")
    return match["id"], match["revision"] or revision


def _open_cached(repo_id: str, revision: str | None, adapter: bool) -> Checkpoint:
    """Through the hub's cache: what is missing is downloaded, pickles only if alone."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import httpx

    try:
        patterns = ["*.safetensors", *SIDE_PATTERNS]
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):
            patterns += PICKLE_PATTERNS
            snapshot_download(repo_id, revision=folder.name, allow_patterns=patterns)
        return Checkpoint(folder, revision=folder.name, adapter=adapter)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise hub_error(repo_id, revision, error) from error


def hub_error(repo_id: str, revision: str | None, error: Exception) -> CheckpointError:
    """What the hub's library raised, as one error that names id, revision and remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{repo_id} (revision {revision or constants.DEFAULT_REVISION})"
    if constants.HF_HUB_OFFLINE:
        return CheckpointError(
            f"{what} is no folder, and not complete in the cache {constants.HF_HUB_CACHE}; offline "
            f"mode is on: unset HF_HUB_OFFLINE, or run `hf download {repo_id}` first"
        )
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, GatedRepoError):
        remedy = "accept the conditions on the model's page and log in with `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        remedy = "the model has no such branch, tag or commit; correct the revision"
    elif isinstance(error, RepositoryNotFoundError):
        remedy = "check the name; for a private model log in with `hf auth login`"
    else:
        remedy = "check name and network"
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return CheckpointError(
        f"{what}: no such folder, and the hub did not give it ({type(error).__name__}: {reason}); "
        f"{remedy}"
    )


def weight_files(
    place: str, folder: Path, present: Collection[str], adapter: bool
) -> tuple[list[str], dict[str, str]]:
    """The weight files of a folder and the index to check them against, if it has one.

    In transformers' order: the single file, the files of the index, whatever other safetensors are
    there; then the same for pickles.
    """
    for suffix, (single, adapter_name, index_name) in FORMATS.items():
        for name in (single, *([adapter_name] if adapter else [])):
            if name in present:
                return [name], {}
        index = read_index(folder / index_name, place) if index_name in present else {}
        files = sorted(set(index.values())) or [adapter_name] * (adapter_name in present)
        if not files and suffix == ".safetensors":
            files = sorted(name for name in present if name.endswith(suffix))
        if adapter_name in files:
            raise CheckpointError(f"{place} is a PEFT adapter, where a whole model is needed")
        for file in files:
            if file not in present:
                raise CheckpointError(
                    f"{place}/{file}: missing shard, named in {index_name}; download or copy it "
                    "again"
                )
        if files:
            return files, index
    others = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth")))
    found = f"and no other weights with a known name ({others[0]})" if others else "nor any other"
    raise CheckpointError(
        f"{place}: no safetensors weights, {found}; convert the model to safetensors with "
        "from_pretrained(...).save_pretrained(...)"
    )


def read_index(path: Path, place: str) -> dict[str, str]:
    """Tensor name -> file name, from an index; `place` is what error messages call its folder."""
    suffix = f".{path.name.split('.')[1]}"
    weight_map = read_json(path, f"{place}/{path.name}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{place}/{path.name}: no weight_map in the index; save the checkpoint again"
        )
    for name, file in weight_map.items():
        # A name, not a resolved path, is checked: the hub's cache is made of links to elsewhere.
        if (
            not isinstance(file, str)
            or not file.endswith(suffix)
            or (PurePosixPath(file).name != file or PureWindowsPath(file).name != file)
        ):
            raise CheckpointError(
                f"{place}/{path.name}: tensor {name!r} points to {file!r}, which is not a "
                f"{suffix[1:]} file of this folder; do not trust this checkpoint"
            )
    return weight_map


def _safetensors_header(path: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    try:
        with safe_open(path, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in sorted(handle.keys())}
            header = [
                (name, tuple(part.get_shape()), DTYPES[part.get_dtype()])
                for name, part in slices.items()
            ]
    except KeyError as error:
        raise CheckpointError(f"{path}: dtype {error} is not supported") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated or not a safetensors file ({error}); download or copy it again"
        ) from error
    for name, shape, _ in header:
        if math.prod(size or 1 for size in shape) >= 1 << 63:
            raise CheckpointError(f"{path}: tensor {name!r} has shape {shape}; copy it again")
    return header


def read_json(path: Path, shown: str | None = None) -> dict:
    """A JSON object from a file, which errors call `shown` (default: its path)."""
    shown = shown or str(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{shown}: a JSON object is expected; download it again")
    return content
