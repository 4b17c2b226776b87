"""A PEFT LoRA adapter seen as a checkpoint of its base model, with all that it trains."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from optmerge_core.checkpoints.factors import Factors, Module
from optmerge_core.checkpoints.folder import Checkpoint
from optmerge_core.checkpoints.formats import ADAPTER_CONFIG, CheckpointError
from optmerge_core.checkpoints.layouts import expert_tensors, mixtures
from optmerge_core.checkpoints.lora_settings import MERGE
from optmerge_core.checkpoints.names import HEAD, closest_names, is_embeddings, is_head
from optmerge_core.checkpoints.weights import IN_MEMORY, Weights, ties

ONE_EXPERT, FUSED = re.compile(r"\.experts\.\d+\."), re.compile(r"\.experts\.[a-z]\w*$")
"""in a name: one of a mixture's experts; a tensor of all of them"""
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
"""model types with layers (transformers' Conv1D) that store a weight as (inputs, outputs); these"""
INPUTS_FIRST = ("gpt_oss", "openai_privacy_filter", "aria")  # PEFT's (experts, inputs, outputs)


class Change(NamedTuple):
    """The base's `own`, or the file's `key` instead; what `vector` makes of that is added to it."""

    own: str
    vector: Callable[[Tensor], Tensor] | None = None
    key: str | None = None


class Adapter(Weights):
    """A LoRA adapter as a checkpoint of `base`: the base's parameter names -> tensors.

    `task_vector(name)` is exact, without the base's rounding; None for what the file has whole. A
    parameter more is a head that the base ties, where the adapter sets it apart, and what the base
    lacks. `modules`: parameter -> module of `factors`. Raises `CheckpointError` for another base's.
    """

    folder: Path

    def __init__(self, weights: Checkpoint, base: Weights):
        self.base, self.weights, self.factors = base, weights, Factors(weights, base)
        self.folder, self.revision = weights.folder, weights.revision
        self.source, self.settings = weights.source, self.factors.settings.values
        self.named_base = str(self.settings.get("base_model_name_or_path") or "")
        self.kind, self._mixtures = base.config().get("model_type"), mixtures(base)
        self.start, self.modules = self.factors.settings.start, dict[str, str]()
        self._all = self._names = {name: Change(name) for name in base}
        self.changes: dict[str, Change] = {}
        self._experts = lru_cache(maxsize=4)(self.factors.experts)  # for one matrix after the other
        for module, place in self.factors.modules.items():
            self._adapt(module, place)
        for module, place in self.factors.tokens.items():
            self._adapt_rows(module, place)
        for path, key in self.factors.whole.items():
            best = closest_names(path, base) or [path]
            if len(best) > 1:
                self._refuse(f"{path} stands for {' or '.join(best)} of the base; {MERGE}")
            self._set(best[0], Change(best[0], key=key))
        self._settle_the_head()

    def _adapt(self, module: str, place: Module) -> None:
        """Factors of a module's weight, and of its bias; or of a parameter."""
        base = self.base
        if names := self.factors.settings.parameters_of(place.path):
            return self._adapt_parameter(module, names)
        name, own = self._names_of(module)
        if name != own and self.settings.get("ensure_weight_tying"):
            return  # the embeddings' own factors, once more
        stored, shape = place.keys.get("base"), self.factors.shape(module)
        if self.kind in TRANSPOSED:
            place.turned |= module.rpartition(".")[2] in CONV1D
        elif self.settings.get("fan_in_fan_out"):
            place.turned |= base.shape(own) == shape[::-1]
        shape = (*shape[1:], shape[0]) if place.turned else shape
        if shape != (self.weights if stored else base).shape(stored or own):
            self._refuse(
                f"{module} has shape {shape}, and {name} of the base {base.folder or IN_MEMORY} "
                f"has {base.shape(own)}; is this an adapter of another base model?"
            )
        if name != own and self.start:
            self._refuse(
                f"{module} is tied to the embeddings, which init_lora_weights changed; {MERGE}"
            )
        self.modules[name], place.own = module, own
        larger = stored if shape != base.shape(own) else None  # of more tokens than the base has
        self._set(name, Change(own, partial(self._product, module), larger))
        if "bias" in place.keys:
            bias = parameter_of(module, base, "bias")
            self._set(bias, Change(bias, lambda tensor: self.factors.bias(module)))

    def _names_of(self, module: str) -> tuple[str, str]:
        """What a module's weight is called here, and in the base: a tied head has a name too."""
        own, name = parameter_of(module, self.base), f"{module}.weight"
        return (name if is_embeddings(own) and is_head(name) else own), own

    def _adapt_parameter(self, module: str, names: list[str]) -> None:
        """Factors of a parameter by itself: shapes tell which of these names, nothing else does."""
        place, base, (b, a) = self.factors.modules[module], self.base, self.factors.shapes(module)
        path, block = (re.sub(r"(\.base_layer)+$", "", text) for text in (place.path, module))
        found = []
        for name in names:
            own, kinds = expert_tensors(block, name, self._mixtures)
            own = own or (best if len(best := closest_names(f"{block}.{name}", base)) == 1 else [])
            shape = base.shape(own[0]) if own else ()
            if len(own) > 1:
                shape = (len(own) // kinds, kinds * shape[0], *shape[1:])
            count, matrix = (shape[0] if len(shape) > 2 else 1), (b[0], a[1])
            right = matrix == shape[-2:] or (len(own) == 1 < count and matrix == shape[:-3:-1])
            if right and a[0] == count * self.factors.settings.rank(f"{path}.{name}"):
                found += [(name, own, kinds, shape)] * (len(shape) == 2 or not self.start)
        if len(found) != 1:
            self._refuse(
                f"{module} has factors A {a}, B {b}, of {len(found)} of the base's {names} by "
                f"target_parameters, r and init_lora_weights; {MERGE}"
            )
        name, own, kinds, shape = found[0]
        place.path, place.own = f"{path}.{name}", own[0]
        turned = matrix != shape[-2:] or (b[0] == a[1] and self.kind in INPUTS_FIRST)
        for i, parameter in enumerate(own):
            part = [*divmod(i, kinds), kinds] if len(own) > 1 else []
            vector = partial(self._stack, module, shape[0], turned, part)
            one = partial(self._product, module)
            self._set(parameter, Change(parameter, vector if len(shape) > 2 else one))

    def _adapt_rows(self, module: str, place: Module) -> None:
        """Some rows of a weight, which take the place of the base's (`trainable_token_indices`)."""
        name, own = self._names_of(module)
        rows, stored = self.factors.settings.tokens(place.path), place.keys.get("base")
        shape = (self.weights if stored else self.base).shape(stored or own)
        of = place.keys["tokens"]
        if self.weights.shape(of) != (len(rows), *shape[1:]) or max(rows, default=0) >= shape[0]:
            self._refuse(
                f"{module} has other rows than trainable_token_indices ({len(rows)}) and the base "
                f"say: {self.weights.shape(of)} of {shape}; give the adapter's own file"
            )

        def vector(tensor: Tensor) -> Tensor:
            change = torch.zeros(tensor.shape)
            change[rows] = self.weights[of].float() - tensor[rows].float()
            return change

        self._set(name, Change(own, vector, stored))

    def _settle_the_head(self) -> None:
        """A head tied to embeddings that change, as PEFT trains it; what is missing is refused."""
        for module in self.factors.settings.saved:
            inside = re.compile(rf"(?:.*\.)?{module}\..*")
            if any(map(inside.match, self.base)) > any(map(inside.match, self.factors.whole)):
                self._refuse(f"{module} of modules_to_save is not in it; save the adapter again")
        changed = [name for name in self.changes if is_embeddings(name)]
        heads = [name for name in self if is_head(name)]
        if len(changed) != 1 or not ties(self.base):
            return
        together = self.settings.get("ensure_weight_tying") or self.factors.tokens
        if not heads and not together:
            self._set(HEAD, Change(changed[0], torch.zeros_like))
        elif heads and together and heads[0] not in self.changes:  # stored, a copy
            self._set(heads[0], self.changes[changed[0]])

    def _set(self, name: str, change: Change) -> None:
        if name in self.changes:
            self._refuse(f"{name} is changed in two ways; {MERGE}")
        self._all[name] = self.changes[name] = change

    def _refuse(self, text: str) -> NoReturn:
        raise CheckpointError(f"{self.folder}: {text}")

    def _product(self, module: str, tensor: Tensor) -> Tensor:
        """The base's parameter -> its task vector: factors, lengths, a weight beside them."""
        stored, lengths = (self.factors.read(module, part) for part in ("base", "magnitude"))
        weight = tensor if stored is None else stored
        turned, (b, a) = self.factors.modules[module].turned, self.factors[module]
        change = (a.mT @ b.mT if turned else b @ a).reshape(weight.shape)
        if lengths is not None:
            change = lengthened(weight.float(), change, lengths, turned)
        return change if stored is None else change + (stored.float() - tensor.float())

    def _stack(self, module: str, count: int, turned: bool, part: list[int], _: Tensor) -> Tensor:
        """Of all experts, or of a part: one's number, which share of its outputs, of how many."""
        b, a = self._experts(module, count)
        if part:
            b, a = b[part[0]].chunk(part[2])[part[1]], a[part[0]]
        return (b @ a).mT if turned else b @ a

    def task_vector(self, name: str, base_tensor: Tensor | None = None) -> Tensor | None:
        """(*shape) float32; zeros for what it does not change."""
        own, vector, key = self._all[name]
        if key or vector is None:
            return None if key else torch.zeros(self.shape(name))
        return vector(self.base[own] if base_tensor is None else base_tensor)

    def __getitem__(self, name: str) -> Tensor:
        own, vector, key = self._all[name]
        tensor = self.weights[key] if key else self.base[own]
        return tensor if vector is None else tensor.float() + vector(tensor)

    def shape(self, name: str) -> tuple[int, ...]:
        own, _, key = self._all[name]
        return self.weights.shape(key) if key else self.base.shape(own)

    def dtype(self, name: str) -> torch.dtype:
        own, _, key = self._all[name]
        return self.weights.dtype(key) if key else self.base.dtype(own)

    def file_sizes(self) -> dict[str, int]:
        own = {ADAPTER_CONFIG: (self.folder / ADAPTER_CONFIG).stat().st_size}
        return own | self.weights.file_sizes()

    def sha256(self) -> dict[str, str]:
        return self.weights.sha256()

    def streamed(self, names: Iterable[str]) -> list[tuple[Weights, list[str]]]:
        """All of the adapter, whatever is read: its factors are small. The base is read apart."""
        return self.weights.streamed(self.weights)


def lengthened(weight: Tensor, change: Tensor, lengths: Tensor, turned: bool) -> Tensor:
    """DoRA's change of a weight: W + change, each output as long as `lengths` says, less W.

    (outputs, *inputs) float32, (inputs, outputs) if turned; Liu et al., "DoRA: weight-decomposed
    low-rank adaptation" (arXiv 2402.09353), eq. 5.
    """
    rows = weight + change
    norms: Tensor = torch.linalg.vector_norm(
        (rows.mT if turned else rows.flatten(1)).double(), dim=1
    )
    shape = (-1,) if turned else (-1, *[1] * (weight.ndim - 1))
    factor = (lengths.flatten().double() / norms).view(shape)
    return (factor - 1).float() * weight + factor.float() * change


def parameter_of(module: str, base: Weights, name: str = "weight") -> str:
    """The base's parameter on disk that is this one of a module in memory; a tied head's too."""
    best = closest_names(f"{module}.{name}", base)
    if not best and is_head(f"{module}.{name}"):
        best = [own for own in base if is_embeddings(own)]
    if not best and ONE_EXPERT.search(module) and any(FUSED.search(own) for own in base):
        raise CheckpointError(
            f"{base.folder or IN_MEMORY} holds a layer's experts in one tensor, and the adapter's "
            f"module {module} is one expert's; give the base with a matrix for each expert, as it "
            "was published or as save_pretrained() without save_original_format=False saves it"
        )
    if len(best) != 1:
        what = f"{module}.{name}".removesuffix(".weight")
        raise CheckpointError(
            f"{base.folder or IN_MEMORY}: the adapter's module {what} stands for "
            f"{' or '.join(best) or 'none'} of its parameters; is it another base model's adapter?"
        )
    return best[0]
