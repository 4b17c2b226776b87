"""A merge as plain data: what headers say of it, decided and checked before a tensor is read.

`plan_merge` opens base model and experts and passes every check that headers allow. Its result says
what becomes of each parameter, how the output's shards are laid out, and cuts the work into parts
that any process can do which sees the same inputs (`merge.merge_part`, `merge.join`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch

from optmerge_core.checkpoints.formats import CheckpointError, dtype_name, read_json
from optmerge_core.checkpoints.names import is_stack
from optmerge_core.checkpoints.writer import (
    CheckpointWriter,
    check_output,
    explained,
    file_names,
    parse_size,
    shard_layout,
)
from optmerge_core.merging.checks import check_folders, check_request, check_settings
from optmerge_core.merging.experts import Opened, open_models
from optmerge_core.merging.inputs import check_same, described, opened_from
from optmerge_core.merging.loop import memory, trim_thresholds_over_model
from optmerge_core.runtime import named_device, parse_device, parse_dtype
from optmerge_core.task_vectors.stack import TaskVectors

FORMAT = 2
PLACE = ("family", "scope", "router", "processor", "chat_template")
"""What `open_models` takes of a plan."""
MAX_PART_COST = 2e10
"""Of a part, in min²·max summed over its matrices, to which singular value decompositions are
proportional; a larger matrix is a part by itself. A 7B model's largest layers have 2.4e11."""


class Planned(TypedDict):
    """What becomes of a parameter."""

    shape: list[int]
    dtype: str
    """as it is stored"""
    merged: str | None
    """the parameter whose task vectors are merged for it, its own but for a tied head; None if the
    base's values are kept"""


@dataclass(frozen=True)
class Part:
    """A run of parameters that is merged at once, into a file of its own."""

    names: list[str]
    bytes: int
    """of the merged tensors, as they are stored"""
    cost: float
    """min²·max, summed over the matrices that merge"""


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do; see `plan_merge`. All fields but the opened inputs are plain data."""

    output_dir: str
    method: str
    method_options: dict[str, Any]
    scaling_coefficient: float
    trim: str
    thresholds: list[float] | None
    """of each expert over the whole model, for trim="model" """
    seed: int
    device: str
    dtype: str | None
    family: str | None
    scope: str
    router: str
    processor: str | None
    """as it was asked for; `Opened.processor` is what follows"""
    chat_template: str | None
    model_type: str | None
    stream: bool
    overwrite: bool
    max_shard_size: int
    base_model: dict[str, Any]
    """location, as it was given; folder, or None for what is only on a server or in memory;
    revision; source; files: name -> [bytes, time of the last change, None where a revision or a
    server pins it]; headers: a hash of what is read before the first tensor"""
    experts: dict[str, dict[str, Any]]
    parameters: dict[str, Planned]
    shards: dict[str, list[str]]
    """file of the output -> its parameters"""
    parts: list[Part]
    learnt: dict[str, Any] | None = None
    """from what data its options were learnt, which report and card say; see `evaluation`"""
    format: int = FORMAT
    _opened: list[Opened] = field(default_factory=list, repr=False, compare=False)

    @cached_property
    def key(self) -> str:
        """A hash of the plan: parts of one plan are never taken for another's.

        No two plans share it whose inputs are in memory, where nothing tells them apart.
        """
        in_memory = not all(item["files"] for item in (self.base_model, *self.experts.values()))
        return _key(self._content()) if not in_memory else secrets.token_hex(8)

    @property
    def parts_folder(self) -> Path:
        """`<output>.parts/<key>`, beside the output: what `merge_part` has finished."""
        output = Path(self.output_dir)
        return output.with_name(f"{output.name}.parts") / self.key

    def memory(self, part: int) -> int:
        """Bytes that merging a part takes at most, one parameter after the other."""
        shapes = [
            x["shape"][is_stack(name, tuple(x["shape"])) :]
            for name in self.parts[part].names
            if (x := self.parameters[name])["merged"]
        ]
        largest = max((memory(shape, len(self.experts)) for shape in shapes), default=0)
        return largest + self.parts[part].bytes

    def opened(self) -> Opened:
        """The inputs, opened once a process. `CheckpointError` if they are no longer the plan's."""
        if not self._opened:
            experts = {name: opened_from(item) for name, item in self.experts.items()}
            place = {x: getattr(self, x) for x in PLACE}
            opened = open_models(opened_from(self.base_model), experts, **place, stream=self.stream)
            self._opened.append(opened)
        opened = self._opened[0]
        inputs = zip(self.experts.values(), opened.experts.values(), strict=True)
        for item, weights in ((self.base_model, opened.base), *inputs):
            check_same(item, weights)
        return opened

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, for `load_plan` in other processes, on other machines.

        Raises `ValueError` where another process could not do the same: for inputs that are models
        in memory, and for options that JSON has no word for.
        """
        for name, item in {"base_model": self.base_model, **self.experts}.items():
            if not item["files"]:
                raise ValueError(
                    f"{name} is a model in memory, which no other process can read; save it with "
                    "save_pretrained(...) and give the folder"
                )
        try:
            text = json.dumps(self._content() | {"key": self.key}, indent=1) + "\n"
        except TypeError as error:
            text = f"method_options of {self.method}: {error}; a file has numbers, texts and lists"
            raise ValueError(f"{text} alone") from error
        partial = Path(f"{path}.{os.getpid()}.partial")
        try:
            with explained(Path(path)):
                partial.write_text(text, encoding="utf-8")
                return partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def writer(self) -> CheckpointWriter:
        """Of the output; its shards will be those of the plan."""
        expected = sum(part.bytes for part in self.parts)
        most, overwrite = self.max_shard_size, self.overwrite
        return CheckpointWriter(self.output_dir, most, overwrite=overwrite, expected_bytes=expected)

    def _content(self) -> dict[str, Any]:
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "_opened"}
        return content | {"parts": [asdict(part) for part in self.parts]}


def plan_merge(
    base_model: str | Path,
    experts: Mapping[str, Any],
    output_dir: str | Path,
    *,
    method: str = "optmerge",
    method_options: Mapping[str, Any] | None = None,
    scaling_coefficient: float = 1.0,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    trim: str = "tensor",
    seed: int = 0,
    overwrite: bool = False,
    family: str | None = None,
    scope: str = "linear",
    router: str = "merge",
    max_shard_size: int | str = "400MB",
    stream: bool = False,
    processor: str | Path | None = None,
    chat_template: str | None = None,
    layers: int | None = None,
    learnt: Mapping[str, Any] | None = None,
    max_part_size: int | str = "256MB",
) -> MergePlan:
    """Decide a merge from headers, and check all that they tell, before a tensor is read.

    `base_model` and the values of `experts` (name -> location) are folders or hub ids
    (`owner/name@revision`), an expert's also a PEFT LoRA adapter's, a model or a state dict in
    memory. A parameter that merges (see `families.mergeable`; `family` replaces config.json's model
    type) becomes base + scaling_coefficient * METHODS[method](stack of task vectors), in float32 on
    `device` (of whoever merges), all else is the base's, byte for byte; options may differ by
    layer, name (`varied`). Stored is the base's dtype, or `dtype`. With `scope="all"` all floating-
    point parameters merge that all experts have in the base's shape; with `router="base"` a
    mixture's routers are the base's. With `trim="model"` the TIES methods trim over the whole
    model: all is read twice, here. With `stream`, inputs may stay on the hub or a web server.
    `processor`, `chat_template`: see `processor.choose`. Parts end at `max_part_size`.

    Raises `ValueError` (`CheckpointError` for files, or another number of layers than `layers`).
    """
    options, stored = dict(method_options or {}), parse_dtype(dtype)
    check_request(experts, method, options, scaling_coefficient, trim, seed, family)
    check_output(output_dir, overwrite=overwrite)
    named_device(device)  # which those who merge have; here it may be missing
    asked = (family, scope, router, processor, chat_template)
    place: dict[str, Any] = dict(zip(PLACE, asked, strict=True))
    opened = open_models(base_model, experts, **place, stream=stream, layers=layers)
    place["processor"] = processor and opened.processor.owner  # a folder's whole path
    check_folders(opened.base, opened.experts, Path(output_dir), opened.processor.folder)
    layout = _layout(opened, stored, max_shard_size, max_part_size)
    size = sum(part.bytes for part in layout["parts"])
    check_output(output_dir, overwrite=overwrite, expected_bytes=size)
    found = _thresholds(opened, trim, method, options, seed, device)
    return MergePlan(
        output_dir=str(Path(output_dir).resolve()), method=method, method_options=options,
        scaling_coefficient=scaling_coefficient, trim=trim, thresholds=found, seed=seed,
        device=str(device), dtype=dtype_name(stored) if stored else None, stream=stream,
        model_type=opened.model_type, overwrite=overwrite, **place, **layout, _opened=[opened],
        base_model=described(base_model, opened.base), learnt=dict(learnt) if learnt else None,
        experts={n: described(experts[n], weights) for n, weights in opened.experts.items()},
    )  # fmt: skip


def load_plan(path: str | Path) -> MergePlan:
    """A plan that `MergePlan.save` wrote. Raises `CheckpointError` for anything else."""
    content = read_json(Path(path))
    key = content.pop("key", None)
    expected = {f.name for f in fields(MergePlan)} - {"_opened"}
    if content.keys() != expected or content["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: not a plan of this version (format {FORMAT}); plan the merge again"
        )
    if key != _key(content):
        raise CheckpointError(f"{path}: changed since it was saved; plan the merge again")
    return MergePlan(**content | {"parts": [Part(**part) for part in content["parts"]]})


def _key(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, default=repr)  # a function has no JSON, but never leaves its process
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _layout(
    opened: Opened, dtype: torch.dtype | None, max_shard_size: int | str, max_part_size: int | str
) -> dict[str, Any]:
    """The fields of a plan that say what becomes of each parameter, and where it goes."""
    merging, base = frozenset(opened.names), opened.base
    parameters, sizes = dict[str, Planned](), dict[str, int]()
    for name in base:
        shape, own, source = base.shape(name), base.dtype(name), opened.tied.get(name, name)
        stored, merged = dtype if dtype and own.is_floating_point else own, source in merging
        parameters[name] = Planned(
            shape=list(shape), dtype=dtype_name(stored), merged=source if merged else None
        )
        sizes[name] = math.prod(shape) * stored.itemsize
    most = parse_size("max_shard_size", max_shard_size)
    shards = shard_layout(sizes, most)
    return {
        "max_shard_size": most,
        "parameters": parameters,
        "shards": dict(zip(file_names(len(shards)), shards, strict=True)),
        "parts": parts_of(parameters, sizes, parse_size("max_part_size", max_part_size)),
    }


def _thresholds(
    opened: Opened, trim: str, method: str, options: dict[str, Any], seed: int, device: str
) -> list[float] | None:
    """Of trimming over the model, if asked. `ValueError` for streams, and first for settings."""
    check_settings(method, options, opened.base, opened.names, len(opened.experts))
    if trim != "model":
        return None
    remote = [x.source for x in (opened.base, *opened.experts.values()) if x.streamed(())]
    if remote:
        raise ValueError(
            f"trim='model' reads all weights three times, too often for {remote[0]}; download the "
            "models first (no stream), or use trim='tensor'"
        )
    task_vectors = TaskVectors(opened.base, opened.experts, opened.names, parse_device(device))
    return trim_thresholds_over_model(task_vectors, method, options, seed).tolist()


def parts_of(parameters: Mapping[str, Planned], sizes: Mapping[str, int], most: int) -> list[Part]:
    """Runs of parameters of at most `most` bytes and MAX_PART_COST; sizes: name -> bytes."""
    parts: list[Part] = []
    for name, parameter in parameters.items():
        cost = 0.0
        if parameter["merged"] and len(parameter["shape"]) > 1:
            *stacked, smaller, larger = *parameter["shape"][:-2], *sorted(parameter["shape"][-2:])
            cost = float(math.prod(stacked) * smaller**2 * larger)
        size, last = sizes[name], parts[-1] if parts else None
        if last and last.bytes + size <= most and last.cost + cost <= MAX_PART_COST:
            parts[-1] = Part([*last.names, name], last.bytes + size, last.cost + cost)
        else:
            parts.append(Part([name], size, cost))
    return parts
