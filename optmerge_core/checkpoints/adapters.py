"""PEFT LoRA adapters: their factors, and an adapter seen as a checkpoint of its base model.

An adapter changes a weight W (outputs, inputs) to W + s B A, with A (r, inputs), B (outputs, r) and
the scale s; PiSSA and OLoRA first took B0 A0 out of W, and change it to W + s B A - B0 A0. What is
more (DoRA, biases, whole modules trained beside the factors) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from optmerge_core.checkpoints.folder import Checkpoint
from optmerge_core.checkpoints.formats import ADAPTER_CONFIG, CheckpointError
from optmerge_core.checkpoints.lora_settings import MERGE, LoraSettings
from optmerge_core.checkpoints.names import PREFIX, WRAPPERS, closest_names, is_embeddings, is_head
from optmerge_core.checkpoints.weights import IN_MEMORY, Weights

KEY = re.compile(
    rf"(?:(?:module|{'|'.join(WRAPPERS)})\.)*{re.escape(PREFIX)}(?P<module>.+)\."
    r"(?:lora_(?P<side>[AB])(?:\.default)?|base_layer)\.weight"
)
ONE_EXPERT, FUSED = re.compile(r"\.experts\.\d+\."), re.compile(r"\.experts\.[a-z]\w*$")
"""in a name: one of a mixture's experts; a tensor of all of them"""
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""model types whose layers (transformers' Conv1D) store a weight as (inputs, outputs)"""


class Factors(Mapping[str, tuple[Tensor, Tensor]]):
    """The factors of a LoRA adapter: module path -> (s B, A), float32, (outputs, r), (r, inputs).

    `weights` is the adapter's folder, opened. Opening it reads headers, access reads two tensors;
    of PiSSA and OLoRA also the weight of `base`, and r is twice the rank: [s B, -B0], [A; A0].
    Raises `CheckpointError` for what is not a LoRA adapter of linear layers alone.
    """

    def __init__(self, weights: Checkpoint, base: Weights | None = None):
        self.weights, self.folder, self.base = weights, weights.folder, base
        if not weights.is_adapter:
            raise CheckpointError(
                f"{self.folder} holds whole weights, where an adapter is needed; `merge` takes "
                "both, with a base model"
            )
        self.settings = LoraSettings(self.folder / ADAPTER_CONFIG)
        if self.settings.start and base is None:
            raise CheckpointError(
                f"{self.settings.path}: the adapter began by changing its base model "
                f"(init_lora_weights {self.settings.start!r}); give that as base_model"
            )
        self._keys: dict[str, dict[str, str]] = {}
        self._paths: dict[str, str] = {}
        for key in weights:
            match = KEY.fullmatch(key)
            path = match["module"] if match else ""
            module = ".".join(word for word in path.split(".") if word not in WRAPPERS)
            known = self._keys.setdefault(module, {})
            if match is None or known.setdefault(match["side"] or "base", key) != key:
                raise CheckpointError(
                    f"{weights.files[0]}: {key!r} is not a LoRA factor of a linear layer; {MERGE}"
                )
            self._paths[module] = path
        if not self._keys:
            raise CheckpointError(f"{self.folder}: no LoRA factors; save the adapter again")
        for module in self:
            self._check(module)

    def rename(self, modules: Mapping[str, str]) -> None:
        """Call modules otherwise: new path -> own."""
        new = {own: path for path, own in modules.items()}
        self._keys = {new.get(own, own): keys for own, keys in self._keys.items()}
        self._paths = {new.get(own, own): path for own, path in self._paths.items()}

    def shape(self, module: str) -> tuple[int, int]:
        """(outputs, inputs) of the product, from the headers."""
        (outputs, _), (_, inputs) = self._shapes(module)
        return outputs, inputs

    def rank(self, module: str) -> int:
        """r, from the headers."""
        return self._shapes(module)[1][0] * (2 if self._began(module) else 1)

    def scale(self, module: str) -> float:
        """s, by the settings."""
        return self.settings.scale(self._paths[module])

    def stored(self, module: str) -> Tensor | None:
        """The base's weight, as PEFT saves it beside a head's factors and puts it in its place."""
        key = self._keys[module].get("base")
        return self.weights[key] if key else None

    def __getitem__(self, module: str) -> tuple[Tensor, Tensor]:
        a, b = (self.weights[self._keys[module][side]].to(torch.float32) for side in "AB")
        b = self.scale(module) * b
        if self.base is None or not self._began(module):
            return b, a
        weight = self.base[parameter_of(module, self.base)].float()
        taken_b, taken_a = self._taken(module, weight, len(a))
        return torch.cat([b, -taken_b], dim=1), torch.cat([a, taken_a])

    def _began(self, module: str) -> bool:
        """Whether the base's weight is less B0 A0, and this not stored beside the factors."""
        return self.settings.start is not None and "base" not in self._keys[module]

    def _taken(self, module: str, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """B0 (outputs, r) and A0 (r, inputs), of the base's weight, in float32 as in PEFT.

        PiSSA (arXiv 2404.02948): its r largest singular values; OLoRA (arXiv 2406.01775): the first
        r columns of Q and rows of R, times s.
        """
        if self.settings.start == "olora":
            q, r = torch.linalg.qr(weight)
            return self.scale(module) * q[:, :rank], r[:rank]
        try:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.folder}: {module}: the base's weight has no singular values ({error}); use "
                "an undamaged base"
            ) from error
        return u[:, :rank] * s[:rank], vh[:rank]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _shapes(self, module: str) -> list[tuple[int, ...]]:
        """Those of B and A; (0, 0) of a missing one."""
        keys = self._keys[module]
        return [self.weights.shape(keys[side]) if side in keys else (0, 0) for side in "BA"]

    def _check(self, module: str) -> None:
        """Factors that fit each other and the settings."""
        (b, a), path = self._shapes(module), self._paths[module]
        where = f"{self.weights.files[0]}: {module}"
        if len(a) > 2 or len(b) > 2:
            raise CheckpointError(
                f"{where} has factors {a} and {b}, not of a linear layer; {MERGE}"
            )
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise CheckpointError(
                f"{where} has factors A {a} and B {b}, which must be (r, inputs) and "
                "(outputs, r); save the adapter again"
            )
        rank = self.settings.rank(path)
        if a[0] != (min(rank, b[0], a[1]) if self.settings.start else rank):
            raise CheckpointError(
                f"{where} has factors of rank {a[0]}, and {ADAPTER_CONFIG} says {rank} (r, "
                "rank_pattern); give the adapter's own file"
            )
        if not self.settings.applies_to(path):
            raise CheckpointError(
                f"{where} has factors, and {ADAPTER_CONFIG} leaves it out (target_modules, "
                "exclude_modules, layers_to_transform); PEFT would not load them: give the "
                "adapter's own file"
            )


class Adapter(Weights):
    """A LoRA adapter as a checkpoint of `base`: the base's parameter names -> tensors.

    `adapter[name]` is the base's tensor, in float32 with the task vector where the adapter has
    factors; `task_vector(name)` is their product, without the base's rounding. An adapted head that
    the base ties to its embeddings is a parameter more: the embeddings' with the task vector.
    Raises `CheckpointError` if a module of the adapter is not a parameter of this base.
    """

    folder: Path

    def __init__(self, weights: Checkpoint, base: Weights):
        self.base, self.weights, self.factors = base, weights, Factors(weights, base)
        self.folder, self.revision = weights.folder, weights.revision
        self.source = weights.source
        self.named_base = str(self.factors.settings.values.get("base_model_name_or_path") or "")
        self.modules: dict[str, str] = {}
        self._own, self.changes = {name: name for name in base}, self.modules
        self._names = self._own
        if (kind := base.config().get("model_type")) in TRANSPOSED:
            raise CheckpointError(f"{self.folder}: an adapter of {kind}, fan_in_fan_out; {MERGE}")
        for module in self.factors:
            name = own = parameter_of(module, base)
            if is_embeddings(own):
                name = f"{module}.weight"
                self._own[name] = own
            shapes = base.shape(own), self.factors.shape(module)
            if shapes[0] != shapes[1] or name in self.modules:
                raise CheckpointError(
                    f"{self.folder}: {module} has shape {shapes[1]}, and {name} of the base "
                    f"{base.folder or IN_MEMORY} has {shapes[0]}; is this an adapter of another "
                    "base model?"
                )
            if name != own and self.factors.settings.start:
                raise CheckpointError(
                    f"{self.folder}: {module} is tied to the embeddings, which init_lora_weights "
                    f"{self.factors.settings.start!r} changed with it; {MERGE}"
                )
            self.modules[name] = module

    def task_vector(self, name: str) -> Tensor:
        """(outputs, inputs) float32; zeros for a parameter without factors."""
        if name not in self.modules:
            return torch.zeros(self.shape(name))
        b, a = self.factors[self.modules[name]]
        stored = self.factors.stored(self.modules[name])
        if stored is None:
            return b @ a
        return b @ a + (stored.float() - self.base[self._own[name]].float())

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.base[self._own[name]]
        return tensor.float() + self.task_vector(name) if name in self.modules else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self._own[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(self._own[name])

    def file_sizes(self) -> dict[str, int]:
        return {
            ADAPTER_CONFIG: (self.folder / ADAPTER_CONFIG).stat().st_size
        } | self.weights.file_sizes()

    def sha256(self) -> dict[str, str]:
        return self.weights.sha256()

    def streamed(self, names: Iterable[str]) -> list[tuple[Weights, list[str]]]:
        """All of the adapter, whatever is read: its factors are small. The base is read apart."""
        return self.weights.streamed(self.weights)


def parameter_of(module: str, base: Weights) -> str:
    """The base's parameter on disk that a module's path in memory stands for.

    That of a head which the base does not store, being tied, is the embeddings. Raises
    `CheckpointError` if there is none, or more than one.
    """
    best = closest_names(f"{module}.weight", base)
    if not best and is_head(f"{module}.weight"):
        best = [name for name in base if is_embeddings(name)]
    if not best and ONE_EXPERT.search(module) and any(FUSED.search(name) for name in base):
        raise CheckpointError(
            f"{base.folder or IN_MEMORY} holds a layer's experts in one tensor, and the adapter's "
            f"module {module} is one expert's; give the base with a matrix for each expert, as it "
            "was published or as save_pretrained() without save_original_format=False saves it"
        )
    if len(best) != 1:
        raise CheckpointError(
            f"{base.folder or IN_MEMORY}: the adapter's module {module} stands for "
            f"{' or '.join(best) or 'none'} of its parameters; is it another base model's adapter?"
        )
    return best[0]
