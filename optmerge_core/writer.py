"""The atomic writer of Hugging Face checkpoint folders: shard by shard, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from optmerge_core.checkpoints import INDEX_NAME, SINGLE_NAME, CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


class CheckpointWriter:
    """Write a Hugging Face folder shard by shard; it appears whole under its name, or not at all.

    Tensors are added in order inside a `with` block. A shard is written when the next tensor would
    take it over `max_shard_size` (bytes, or "500MB", "5GB"), so at most one shard is in memory.
    Everything goes to the sibling folder `.<name>.partial`, which is renamed at the end and removed
    on any error. With `overwrite`, an existing checkpoint folder is replaced only then. `single` is
    the file's name where one is enough.

    Raises `CheckpointError` before anything is written if the output exists (and must not or cannot
    be overwritten) or if the disk has less than `expected_bytes` free.
    """

    def __init__(
        self,
        output_dir: str | Path,
        max_shard_size: int | str = "500MB",
        *,
        overwrite: bool = False,
        expected_bytes: int = 0,
        single: str = SINGLE_NAME,
    ):
        self.single = single
        self.output_dir = Path(output_dir).resolve()
        self.max_shard_bytes = _parse_size(max_shard_size)
        check_output(self.output_dir, overwrite=overwrite, expected_bytes=expected_bytes)
        self.folder = self.output_dir.parent / f".{self.output_dir.name}.partial"
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._total_bytes = 0

    def __enter__(self) -> CheckpointWriter:
        shutil.rmtree(self.folder, ignore_errors=True)  # left by a killed process
        self.folder.mkdir(parents=True)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one parameter; it must not change until the block ends."""
        if name in self._names:
            raise CheckpointError(f"{self.output_dir}: tensor {name!r} added twice")
        tensor = tensor.detach().cpu().contiguous()
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self._names.add(name)

    def copy_side_files(self, base_folder: str | Path) -> None:
        """Copy what is not weights: configs, tokenizer, processor, chat templates, remote code."""
        for path in side_files(base_folder):
            target = self.folder / path.relative_to(base_folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)

    def write_text(self, name: str, text: str) -> None:
        """Write one side file, replacing a copied one of that name."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            if error_type is None:
                self._finish()
        finally:
            self._pending.clear()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _flush(self) -> None:
        path = self.folder / f"{len(self._shards) + 1:05d}"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending.clear()
        self._pending_bytes = 0

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else self.single
            (self.folder / f"{number:05d}").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            metadata = {"total_size": self._total_bytes}
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            self.write_text(INDEX_NAME, json.dumps(index, indent=2) + "\n")
        if not self.output_dir.exists():
            self.folder.rename(self.output_dir)
            return
        old = self.output_dir.parent / f".{self.output_dir.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        self.output_dir.rename(old)
        try:
            self.folder.rename(self.output_dir)
        except OSError:
            old.rename(self.output_dir)
            raise
        shutil.rmtree(old)


def check_output(
    output_dir: str | Path, *, overwrite: bool = False, expected_bytes: int = 0
) -> None:
    """Raise `CheckpointError` if a checkpoint of `expected_bytes` cannot go to `output_dir`.

    An empty folder is as good as none; only a folder that holds a checkpoint can be overwritten.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        if not overwrite:
            raise CheckpointError(
                f"{output_dir} exists: choose another output folder, or ask to overwrite it"
            )
        if not output_dir.is_dir() or not any(output_dir.glob("*.safetensors")):
            raise CheckpointError(
                f"{output_dir} is not a checkpoint folder, so it is not overwritten: choose another"
            )
    existing = output_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < expected_bytes:
        raise CheckpointError(
            f"{output_dir}: {expected_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on that "
            "disk; free some space or choose another output folder"
        )


def side_files(folder: str | Path) -> list[Path]:
    """The files of a checkpoint folder that are not weights, their index or a note on a merge."""
    folder = Path(folder)
    skipped = {"README.md", "merge_report.json"}
    files = [*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")]
    return sorted(
        path
        for path in files
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix not in WEIGHT_SUFFIXES
        and not path.name.endswith(".index.json")
        and path.name not in skipped
    )


def _parse_size(size: int | str) -> int:
    """Bytes of 1000, "20KB", "500MB", "1.5GB" (powers of ten, as transformers counts them)."""
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(B|KB|MB|GB)?", str(size).upper())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size {size!r}: give bytes, or a text like '500MB' or '1GB'")
    return int(float(match[1]) * units[match[2] or "B"])
