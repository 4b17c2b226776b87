"""PEFT LoRA adapters: their factors, and an adapter seen as a checkpoint of its base model.

An adapter changes a weight W (outputs, inputs) to W + s B A, with A (r, inputs), B (outputs, r) and
the scale s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (rsLoRA). What is more (DoRA,
biases, whole modules trained beside the factors) is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from optmerge_core.checkpoints.folder import Checkpoint
from optmerge_core.checkpoints.formats import CheckpointError, read_json
from optmerge_core.checkpoints.names import closest_names
from optmerge_core.checkpoints.weights import IN_MEMORY, Weights

CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."  # what PEFT puts before a module's path
FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
UNSUPPORTED = ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "target_parameters")
REMEDY = "merge it into its base model (PEFT's merge_and_unload) and give that folder"


class Factors(Mapping[str, tuple[Tensor, Tensor]]):
    """The factors of a LoRA adapter: module path -> (s B, A), float32, (outputs, r), (r, inputs).

    `weights` is the adapter's folder, opened. Opening it reads headers, access reads two tensors.
    Raises `CheckpointError` for what is not a plain LoRA adapter of linear layers.
    """

    def __init__(self, weights: Checkpoint):
        self.weights, self.folder = weights, weights.folder
        self.settings = read_json(self.folder / CONFIG_NAME)
        self._check_settings()
        found: dict[str, dict[str, str]] = {}
        for key in weights:
            match = FACTOR.fullmatch(key)
            if match is None:
                raise CheckpointError(
                    f"{weights.files[0]}: {key!r} is not a LoRA factor of a linear layer; {REMEDY}"
                )
            found.setdefault(match["module"], {})[match["side"]] = key
        if not found:
            raise CheckpointError(f"{self.folder}: no LoRA factors; save the adapter again")
        self._keys: dict[str, tuple[str, str]] = {}
        for module, keys in found.items():
            a, b = (weights.shape(keys[side]) if side in keys else (0, 0) for side in "AB")
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
                raise CheckpointError(
                    f"{weights.files[0]}: {module} has factors A {a} and B {b}, which "
                    "must be (r, inputs) and (outputs, r); save the adapter again"
                )
            self._keys[module] = keys["A"], keys["B"]

    def shape(self, module: str) -> tuple[int, int]:
        """(outputs, inputs) of the product, from the headers."""
        a, b = self._keys[module]
        return self.weights.shape(b)[0], self.weights.shape(a)[1]

    def rank(self, module: str) -> int:
        """r, from the header."""
        return self.weights.shape(self._keys[module][0])[0]

    def scale(self, module: str) -> float:
        """alpha / r or alpha / sqrt(r), by PEFT's `alpha_pattern` if it has the module."""
        alpha, rank = self.settings["lora_alpha"], self.rank(module)
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def __getitem__(self, module: str) -> tuple[Tensor, Tensor]:
        a, b = (self.weights[key].to(torch.float32) for key in self._keys[module])
        return self.scale(module) * b, a

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _check_settings(self) -> None:
        path, kind = self.folder / CONFIG_NAME, self.settings.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{path}: the adapter is of type {kind}, not LORA; {REMEDY}")
        used = [key for key in UNSUPPORTED if self.settings.get(key)]
        if used:
            raise CheckpointError(f"{path}: the adapter uses {', '.join(used)}; {REMEDY}")
        pattern = self.settings.get("alpha_pattern") or {}
        if not isinstance(pattern, dict):
            raise CheckpointError(f"{path}: alpha_pattern is no mapping; save the adapter again")
        for key, alpha in {"lora_alpha": self.settings.get("lora_alpha"), **pattern}.items():
            if not isinstance(alpha, int | float) or not abs(alpha) < 1e30:  # NaN neither
                raise CheckpointError(
                    f"{path}: {key} is not a number ({str(alpha)[:40]}); save the adapter again"
                )
        try:
            for key in pattern:
                re.compile(f"(?:{key})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: alpha_pattern is no regular expression ({error}); save the adapter again"
            ) from error


class Adapter(Weights):
    """A LoRA adapter as a checkpoint of `base`: the base's parameter names -> tensors.

    `adapter[name]` is base + s B A in float32 where the adapter has factors, else the base's own
    tensor; `task_vector(name)` is s B A itself, without the base's rounding.
    Raises `CheckpointError` if a module of the adapter is not a parameter of this base.
    """

    folder: Path

    def __init__(self, weights: Checkpoint, base: Weights):
        self.base, self.weights, self.factors = base, weights, Factors(weights)
        self.folder, self.revision = weights.folder, weights.revision
        self.source = weights.source
        self.named_base = str(self.factors.settings.get("base_model_name_or_path") or "")
        self.modules: dict[str, str] = {}
        self._names, self.changes = base, self.modules
        for module in self.factors:
            name = parameter_of(module, base)
            shapes = base.shape(name), self.factors.shape(module)
            if shapes[0] != shapes[1] or name in self.modules:
                raise CheckpointError(
                    f"{self.folder}: {module} has shape {shapes[1]}, and {name} of the base "
                    f"{base.folder or IN_MEMORY} has {shapes[0]}; is this an adapter of another "
                    "base model?"
                )
            self.modules[name] = module

    def task_vector(self, name: str) -> Tensor:
        """s B A, (outputs, inputs) float32; zeros for a parameter without factors."""
        if name not in self.modules:
            return torch.zeros(self.base.shape(name))
        b, a = self.factors[self.modules[name]]
        return b @ a

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.base[name]
        return tensor.float() + self.task_vector(name) if name in self.modules else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def file_sizes(self) -> dict[str, int]:
        return {CONFIG_NAME: (self.folder / CONFIG_NAME).stat().st_size} | self.weights.file_sizes()

    def sha256(self) -> dict[str, str]:
        return self.weights.sha256()

    def streamed(self, names: Iterable[str]) -> list[tuple[Weights, list[str]]]:
        """All of the adapter, whatever is read: its factors are small. The base is read apart."""
        return self.weights.streamed(self.weights)


def parameter_of(module: str, base: Weights) -> str:
    """The base's parameter on disk that a module's path in memory stands for.

    Raises `CheckpointError` if there is none, or more than one.
    """
    best = closest_names(f"{module}.weight", base)
    if len(best) != 1:
        raise CheckpointError(
            f"{base.folder or IN_MEMORY}: the adapter's module {module} stands for "
            f"{' or '.join(best) or 'none'} of its parameters; is it another base model's adapter?"
        )
    return best[0]
