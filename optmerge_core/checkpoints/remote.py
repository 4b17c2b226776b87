"""Checkpoints read over the network, tensor by tensor: no weights go to the disk.

A safetensors file begins with a header that says where each tensor lies: range requests fetch the
header, and then one tensor at a time, from the hub or from any web server that understands ranges.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from urllib.parse import quote, urlsplit

import torch
from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, httpx
from torch import Tensor
from tqdm.auto import tqdm

from optmerge_core.checkpoints.folder import Checkpoint
from optmerge_core.checkpoints.formats import (
    ADAPTER_NAME,
    INDEX_NAME,
    SIDE_PATTERNS,
    SINGLE_NAME,
    SPEAKERS,
    CheckpointError,
    Entry,
    read_header,
    read_index,
    read_json,
    weight_files,
)
from optmerge_core.checkpoints.http import DOWNLOAD, TIMEOUT, NotThere, RemoteFile
from optmerge_core.checkpoints.weights import Weights

MAX_MODULES = 100  # of remote code: no chain of imports goes on for ever
SIDE_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    *("chat_template.json", "preprocessor_config.json", "processor_config.json"),
    *("image_preprocessor_config.json", "video_preprocessor_config.json", "README.md"),
    SPEAKERS,
)


class RemoteCheckpoint(Checkpoint):
    """A checkpoint whose weights stay on a server: the interface of `Checkpoint`.

    `files` are its weight files by name, `folder` holds its side files on the disk. Opening reads
    the headers, indexing one tensor.
    """

    def __init__(
        self,
        source: str,
        folder: Path,
        files: Mapping[str, RemoteFile],
        adapter: bool,
        revision: str | None = None,
        digests: Mapping[str, str] | None = None,
    ):
        self.source, self.folder, self.revision, self._pickles = source, folder, revision, {}
        self._remote, self._digests = files, digests or {}
        present = {*files, *(path.name for path in folder.iterdir())}
        self._read_headers(source, present, adapter)

    def _read_header(self, file: str) -> list[Entry]:
        remote = self._remote[file]
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{remote.url}: a pickle cannot be streamed; {DOWNLOAD}")
        first = remote.read(0, 8)
        assert remote.size is not None, "known from the first answer"
        return read_header(first, lambda n: remote.read(8, 8 + n), remote.size, remote.url)

    def __getitem__(self, name: str) -> Tensor:
        file, shape, dtype, start = self._entries[self._own[name]]
        data = self._remote[file].read(start, start + self.nbytes(name), self.on_bytes)
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    def streamed(self, names: Iterable[str]) -> list[tuple[Weights, list[str]]]:
        return [(self, list(names))]

    def file_sizes(self) -> dict[str, int]:
        return {file.name: self._remote[file.name].size or 0 for file in self.files}

    def hash_beside(self, name: str) -> None:
        """Nothing: the bytes are not kept."""

    def sha256(self) -> dict[str, str]:
        """File name -> SHA-256 where the hub tells it; else size and version, marked as such."""
        return {
            file.name: self._digests.get(file.name)
            or f"not hashed: {remote.size} bytes, version {remote.version}"
            for file in self.files
            for remote in [self._remote[file.name]]
        }


def open_hub(repo_id: str, revision: str | None, adapter: bool) -> Checkpoint:
    """A hub id with its side files in the hub's cache, and its weights on the hub.

    Weights that the cache has are read from there. The revision is resolved to a commit once.
    """
    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT)
        folder = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=SIDE_PATTERNS))
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise hub_error(repo_id, revision, error) from error
    files = {file.rfilename: file for file in info.siblings or []}
    source = hf_hub_url(repo_id, "", revision=info.sha).rstrip("/")
    weights, _ = weight_files(source, folder, files, adapter)
    if all((folder / name).is_file() for name in weights):
        return Checkpoint(folder, info.sha, adapter)
    headers = build_hf_headers()
    remote = {
        name: RemoteFile(hf_hub_url(repo_id, name, revision=info.sha), headers, files[name].size)
        for name in weights
    }
    digests = {name: lfs.sha256 for name in weights if (lfs := files[name].lfs)}
    return RemoteCheckpoint(source, folder, remote, adapter, info.sha, digests)


def open_url(url: str, adapter: bool) -> RemoteCheckpoint:
    """The folder of a checkpoint on a web server.

    A server does not list what it has: the index, `model.safetensors` or an adapter's
    `adapter_model.safetensors` says what the weights are, and side files are fetched by their
    usual names, into a folder that goes when the checkpoint does.
    """
    url, parts = url.rstrip("/"), urlsplit(url)
    if not parts.hostname or parts.username or parts.query or parts.fragment:
        raise CheckpointError(
            f"{parts.scheme}://{parts.hostname}{parts.path}: give the plain URL of a folder, "
            "without user, password, ? and #"
        )
    folder = Path(tempfile.mkdtemp(prefix="optmerge_"))
    try:
        _fetch_side_files(url, folder)
        sharded = (folder / INDEX_NAME).exists()
        candidates = (SINGLE_NAME, *([ADAPTER_NAME] if adapter and not sharded else []))
        for name in candidates:
            try:
                files = {name: RemoteFile(f"{url}/{name}")}
                checkpoint = RemoteCheckpoint(url, folder, files, adapter)
                break
            except NotThere as error:
                reason = error
        else:
            if not sharded:
                raise CheckpointError(
                    f"{url}: no {' or '.join((*candidates, INDEX_NAME))} there ({reason})"
                )
            shards = sorted(set(read_index(folder / INDEX_NAME, url).values()))
            files = {shard: RemoteFile(f"{url}/{quote(shard)}") for shard in shards}
            checkpoint = RemoteCheckpoint(url, folder, files, adapter)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(checkpoint, shutil.rmtree, folder, ignore_errors=True)
    return checkpoint


@contextmanager
def streaming(readings: Iterable[tuple[Weights, Iterable[str]]]) -> Iterator[None]:
    """A progress bar of the bytes that come while the remote ones of these weights are read.

    readings: weights, and the names of the parameters that will be read of them.
    """
    remote = [found for weights, names in readings for found in weights.streamed(names)]
    total, lock = sum(x.nbytes(name) for x, names in remote for name in names), threading.Lock()
    with tqdm(
        total=total, desc="streaming", unit="B", unit_scale=True, disable=not remote
    ) as progress:

        def came(count: int) -> None:
            with lock:
                progress.update(count)

        for checkpoint, _ in remote:
            checkpoint.on_bytes = came
        try:
            yield
        finally:
            for checkpoint, _ in remote:
                checkpoint.on_bytes = None


def _fetch_side_files(url: str, folder: Path) -> None:
    """What is not weights, by its usual name, and the Python modules that `auto_map` names."""

    def fetch(name: str) -> bool:
        try:
            (folder / name).write_bytes(RemoteFile(f"{url}/{name}").fetch())
        except NotThere:
            return False
        return True

    found = [name for name in (*SIDE_FILES, INDEX_NAME) if fetch(name)]
    wanted: list[str] = []
    for name in found:
        if name.endswith("config.json"):
            mapped = read_json(folder / name, f"{url}/{name}").get("auto_map") or {}
            wanted += re.findall(r"'(\w+)\.\w+'", str(mapped))
    for module in islice(wanted, MAX_MODULES):  # grows by what the modules import
        path = folder / f"{module}.py"
        if not path.exists() and fetch(path.name):
            text = path.read_text(encoding="utf-8", errors="replace")
            wanted += re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)


REMEDIES = {
    GatedRepoError: "accept the conditions on the model's page and log in with `hf auth login`",
    RevisionNotFoundError: "the model has no such branch, tag or commit; correct the revision",
    RepositoryNotFoundError: "check the name; for a private model log in with `hf auth login`",
    Exception: "check name and network",
}


def hub_error(repo_id: str, revision: str | None, error: Exception) -> CheckpointError:
    """What the hub's library raised, as one error that names id, revision and remedy."""
    what = f"{repo_id} (revision {revision or constants.DEFAULT_REVISION})"
    if constants.HF_HUB_OFFLINE:
        return CheckpointError(
            f"{what} is no folder, and not complete in the cache {constants.HF_HUB_CACHE}; offline "
            f"mode is on: unset HF_HUB_OFFLINE, or run `hf download {repo_id}` first"
        )
    if isinstance(error, CheckpointError):
        return error
    remedy = next(text for kind, text in REMEDIES.items() if isinstance(error, kind))
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return CheckpointError(
        f"{what}: no such folder, and the hub did not give it ({type(error).__name__}: {reason}); "
        f"{remedy}"
    )
