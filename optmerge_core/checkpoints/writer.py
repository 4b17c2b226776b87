"""The atomic writer of Hugging Face checkpoint folders: shard by shard, whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from optmerge_core.checkpoints.formats import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointError,
    NotYet,
    side_files,
)


class CheckpointWriter:
    """Write a Hugging Face folder shard by shard; it appears whole under its name, or not at all.

    Tensors are added in order inside a `with` block. A shard is written when the next tensor would
    take it over `max_shard_size` (bytes, or "500MB", "5GB"), while the next is collected, so at
    most two are in memory. Everything goes to the sibling folder `.<name>.partial`, which is
    renamed at the end, once it is on the disk, and removed on any error. With `overwrite`, an
    existing checkpoint folder is replaced only then. `single` is the file's name where one is
    enough.

    A process killed on the way leaves `.<name>.partial`, `.<name>.lock` or, killed between the two
    renames of a replacement, the replaced folder as `.<name>.old`. The next writer puts that one
    back and removes the others.

    Raises `CheckpointError` before anything is written if the output exists (and must not or cannot
    be overwritten), if another process writes there, if the folder cannot be written or if the disk
    has less than `expected_bytes` free; later if the disk fails or is full.
    """

    def __init__(
        self,
        output_dir: str | Path,
        max_shard_size: int | str = "400MB",
        *,
        overwrite: bool = False,
        expected_bytes: int = 0,
        single: str = SINGLE_NAME,
    ):
        self.single = single
        self.output_dir = Path(output_dir).resolve()
        self.max_shard_bytes = parse_size("max_shard_size", max_shard_size)
        self._demands: dict[str, Any] = {"overwrite": overwrite, "expected_bytes": expected_bytes}
        check_output(self.output_dir, **self._demands)
        self.folder = self.output_dir.with_name(f".{self.output_dir.name}.partial")
        self._old = self.output_dir.with_name(f".{self.output_dir.name}.old")
        self._new_parents = [path for path in self.output_dir.parents if not path.exists()]
        self._lock: int | None = None
        self._written: list[Future[str]] = []
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._total_bytes = 0

    def __enter__(self) -> CheckpointWriter:
        try:
            with explained(self.output_dir):
                self.output_dir.parent.mkdir(parents=True, exist_ok=True)
                self._lock = _lock(self.output_dir)
                self._clear()
                check_output(self.output_dir, **self._demands)
                self.folder.mkdir()
        except BaseException:
            self._release()
            raise
        self._disk = ThreadPoolExecutor(1)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one parameter; it must not change until the block ends."""
        if name in self._names:
            raise CheckpointError(f"{self.output_dir}: tensor {name!r} added twice")
        tensor = tensor.detach().cpu().contiguous()
        if _starts_shard(self._pending, self._pending_bytes, tensor.nbytes, self.max_shard_bytes):
            self.flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self._names.add(name)

    def flush(self) -> None:
        """End a shard: it is written while the next one is computed, or what else there is to do.

        Waits for the one before it, and raises what the disk has said of that.
        """
        if not self._pending:
            return
        with explained(self.output_dir):
            for written in self._written[-1:]:
                written.result()
        self._shards.append(list(self._pending))
        path, tensors = self.folder / f"{len(self._shards):05d}", self._pending
        self._pending, self._pending_bytes = {}, 0
        self._written.append(self._disk.submit(_write, tensors, path))

    def digests(self) -> dict[str, str]:
        """File -> SHA-256 of the weights, after the last tensor; hashed while others were computed.

        Waits until they are on the disk.
        """
        self.flush()
        with explained(self.output_dir):
            hashes = [written.result() for written in self._written]
        return dict(zip(file_names(len(hashes), self.single), hashes, strict=True))

    def copy_side_files(
        self, folder: str | Path, wanted: Callable[[str], object] = lambda name: True
    ) -> None:
        """Copy what is not weights: configs, tokenizer, processor, chat templates, remote code.

        Of these what is `wanted`, by the file's name.
        """
        with explained(self.output_dir):
            for path in filter(lambda path: wanted(path.name), side_files(folder)):
                target = self.folder / path.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)

    def write_text(self, name: str, text: str) -> None:
        """Write one side file, replacing a copied one of that name."""
        with explained(self.output_dir):
            (self.folder / name).write_text(text, encoding="utf-8")

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            if error_type is None:
                with explained(self.output_dir):
                    self._finish()
        finally:
            self._pending.clear()
            self._disk.shutdown(cancel_futures=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            self._release()

    def _finish(self) -> None:
        files, weight_map = self.digests(), {}
        for number, (file, names) in enumerate(zip(files, self._shards, strict=True), start=1):
            (self.folder / f"{number:05d}").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if len(files) > 1:
            metadata = {"total_size": self._total_bytes}
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            self.write_text(INDEX_NAME, json.dumps(index, indent=2) + "\n")
        for path in (*self.folder.rglob("*"), self.folder):
            sync(path)
        check_output(self.output_dir, overwrite=self._demands["overwrite"])
        if _occupied(self.output_dir):
            self.output_dir.rename(self._old)
        try:
            self.folder.rename(self.output_dir)
        except OSError:
            if self._old.exists():
                self._old.rename(self.output_dir)
            raise
        sync(self.output_dir.parent)
        self._clear()

    def _clear(self) -> None:
        """Remove what a killed process has left; `.<name>.old` is whole, so it may be put back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._old.exists():
            # Renamed before it is removed, so that nothing named `.old` is ever half a checkpoint.
            self._old.rename(self.folder if _occupied(self.output_dir) else self.output_dir)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _release(self) -> None:
        if self._lock is not None:
            with suppress(OSError):
                self.output_dir.with_name(f".{self.output_dir.name}.lock").unlink()
            os.close(self._lock)
            self._lock = None
        for path in self._new_parents:
            with suppress(OSError):  # not empty: it holds the output
                path.rmdir()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the disk refuses as one `CheckpointError` that names the path and the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written ({error}); free some space or choose another output folder"
        ) from error


def shard_layout(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """The parameters of each shard that `CheckpointWriter` makes of parameters of these sizes."""
    shards: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not shards or _starts_shard(shards[-1], total, size, max_shard_bytes):
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards


def _starts_shard(shard: Collection[str], shard_bytes: int, size: int, most: int) -> bool:
    return bool(shard) and shard_bytes + size > most


def file_names(shards: int, single: str = SINGLE_NAME) -> list[str]:
    """The names of a checkpoint's weight files, as transformers gives them."""
    numbers = range(1, shards + 1)
    several = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in numbers]
    return several if shards > 1 else [single] * shards


def _lock(output_dir: Path) -> int:
    """A lock file held open; the system releases it when the process ends, however it ends."""
    path = output_dir.with_name(f".{output_dir.name}.lock")
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise NotYet(
                f"{output_dir}: another process is writing there; wait for it, or choose another "
                "output folder"
            ) from None
        except OSError:
            return lock  # a file system without locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        os.close(lock)  # its holder has just finished and removed it


def _write(tensors: dict[str, Tensor], path: Path) -> str:
    """Until the file is on the disk and `tensors` is empty; returns its SHA-256."""
    save_file(tensors, path, metadata={"format": "pt"})
    tensors.clear()
    sync(path)
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file is on the disk, so that a power cut cannot leave it empty or short."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def check_output(
    output_dir: str | Path, *, overwrite: bool = False, expected_bytes: int = 0
) -> None:
    """Raise `CheckpointError` if a checkpoint of `expected_bytes` cannot go to `output_dir`.

    An empty folder is as good as none; only a folder that holds a checkpoint can be overwritten.
    """
    output_dir = Path(output_dir)
    if output_dir.is_mount():
        raise CheckpointError(f"{output_dir} is a mount point: choose a new folder inside it")
    if _occupied(output_dir):
        if not overwrite:
            raise CheckpointError(
                f"{output_dir} exists: choose another output folder, or ask to overwrite it "
                "(overwrite=True, --overwrite)"
            )
        if not output_dir.is_dir() or not any(output_dir.glob("*.safetensors")):
            raise CheckpointError(
                f"{output_dir} is not a checkpoint folder, so it is not overwritten: choose another"
            )
    resolved = output_dir.resolve()
    parent = resolved.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        problem = "not writable" if parent.is_dir() else "a file, not a folder"
        raise CheckpointError(f"{output_dir}: {parent} is {problem}; choose another output folder")
    free = shutil.disk_usage(parent).free
    with suppress(FileNotFoundError):  # what a killed process left is removed first
        for path in resolved.with_name(f".{resolved.name}.partial").rglob("*"):
            free += path.stat().st_size
    if free < expected_bytes:
        raise CheckpointError(
            f"{output_dir}: {expected_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on that "
            "disk; free some space or choose another output folder"
        )


def _occupied(path: Path) -> bool:
    """Whether something is there; an empty folder is as good as none."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def parse_size(name: str, size: int | str) -> int:
    """Bytes of 1000, "20KB", "500MB", "1.5GB" (powers of ten, as transformers counts them)."""
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(B|KB|MB|GB)?", str(size).upper())
    count = int(Fraction(match[1]) * units[match[2] or "B"]) if match else 0
    if count < 1:
        raise ValueError(f"{name} {size!r}: give bytes, or a text like '500MB' or '1GB'")
    return count
