"""What a PEFT LoRA adapter's file holds: factors of modules, rows of tokens, whole parameters.

Factors change a weight W (outputs, inputs) to W + s B A, with A (r, inputs), B (outputs, r) and the
scale s; PiSSA and OLoRA first took B0 A0 out of W. DoRA gives each output a length of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optmerge_core.checkpoints.folder import Checkpoint
from optmerge_core.checkpoints.formats import ADAPTER_CONFIG, CheckpointError
from optmerge_core.checkpoints.lora_settings import MERGE, LoraSettings
from optmerge_core.checkpoints.names import PREFIX, WRAPPERS, is_head
from optmerge_core.checkpoints.weights import Weights

KEY = re.compile(rf"(?:(?:module|{'|'.join(WRAPPERS)})\.)*{re.escape(PREFIX)}(?P<path>.+)")
PART = re.compile(
    r"(?P<module>.+?)\.(?:(?P<A>lora_A\.weight|lora_embedding_A)|(?P<B>lora_B\.weight|lora_embedding_B)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.weight)?)|(?P<bias>lora_B\.bias)"
    r"|(?P<tokens>token_adapter\.trainable_tokens_delta)"
    r"|(?P<base>(?:token_adapter\.)?base_layer\.weight))"
)
"""the end of a name: what it is of its module; all that is not here is a whole parameter"""
DEFAULT = re.compile(r"(lora_\w+|trainable_tokens_delta|modules_to_save)\.default\b")  # a name
WORDS = {"base_layer", "token_adapter", "modules_to_save"} | WRAPPERS  # PEFT's, in a path
BESIDE = {"magnitude": "use_dora", "bias": "lora_bias"}  # a number for each output -> setting


@dataclass
class Module:
    """What has factors or rows. path: PEFT's; keys: part -> tensor; own: the base's parameter."""

    path: str
    keys: dict[str, str] = field(default_factory=dict)
    own: str = ""
    turned: bool = False  # (inputs, outputs), as embeddings are


class Factors(Mapping[str, tuple[Tensor, Tensor]]):
    """The factors of a LoRA adapter: module path -> (s B, A), float32, (outputs, r), (r, inputs).

    `weights` is the adapter's folder, opened. Opening it reads headers, access reads two tensors;
    of PiSSA and OLoRA also the weight of `base`, and r is twice the rank: [s B, -B0], [A; A0].
    `tokens`: module -> its trained rows; `whole`: parameter -> its tensor in the file. Raises
    `CheckpointError` for what is not a LoRA adapter.
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
        self.modules, self.whole = dict[str, Module](), dict[str, str]()
        for key in sorted(weights, key=lambda key: ".modules_to_save." in key):  # copies last
            self._sort(key)
        beside = [name for name, module in self.modules.items() if module.keys.keys() == {"base"}]
        self.whole |= {f"{name}.weight": self.modules.pop(name).keys["base"] for name in beside}
        rows = [name for name, module in self.modules.items() if "tokens" in module.keys]
        self.tokens = {name: self.modules.pop(name) for name in rows}
        if not (self.modules or self.whole or self.tokens):
            raise CheckpointError(f"{self.folder}: no LoRA factors; save the adapter again")
        for module in self:
            self._check(module)

    def _sort(self, key: str) -> None:
        """Where a tensor of the file belongs."""
        match = KEY.fullmatch(key)
        path = DEFAULT.sub(r"\1", match["path"]) if match else ""
        words, known = path.split("."), False
        if part := PART.fullmatch(path):
            name = ".".join(word for word in part["module"].split(".") if word not in WRAPPERS)
            module = self.modules.setdefault(name, Module(part["module"]))
            module.turned |= "lora_embedding_" in path
            known = module.keys.setdefault(str(part.lastgroup), key) == key
        elif "original_module" in words or words[-1] == "trainable_tokens_original":
            known = True  # the base's own
        elif "lora_" not in path and len(words) > 1:
            name = ".".join(word for word in words if word not in WORDS)
            known = self.whole.setdefault(name, key) == key or "modules_to_save" in words
        if not known:
            raise CheckpointError(
                f"{self.weights.files[0]}: {key!r} is nothing that LoRA trains, or twice; {MERGE}"
            )

    def rename(self, modules: Mapping[str, str]) -> None:
        """Call modules otherwise: new path -> own."""
        new = {own: path for path, own in modules.items()}
        self.modules = {new.get(own, own): module for own, module in self.modules.items()}

    def others(self) -> list[str]:
        """What is not a pair of factors of a linear layer, in words: each kind with an example."""
        items, of = self.modules.items(), self.settings.parameters_of
        whole = [*self.whole, *self.tokens]
        paths = {n: x.path.rpartition(".") for n, x in items}  # of a parameter once a base is known
        single = [n for n, x in items if of(x.path) or paths[n][2] in of(paths[n][0])]
        kinds = {
            "DoRA's lengths": [n for n, x in items if "magnitude" in x.keys],
            "a bias of factors (lora_bias)": [n for n, x in items if "bias" in x.keys],
            "factors of embeddings": [n for n, x in items if "lora_embedding_" in x.keys["A"]],
            "factors of a convolution": [n for n in self if len(self.shape(n)) > 2],
            "factors of a parameter (target_parameters)": single,
            "a parameter's new value (modules_to_save, bias, trainable_token_indices)": whole,
        }
        return [f"{kind}: {names[0]}" for kind, names in kinds.items() if names]

    def shape(self, module: str) -> tuple[int, ...]:
        """(outputs, inputs) of the product, from the headers; (outputs, inputs, *kernel)."""
        (outputs, *_), (_, *inputs) = self.shapes(module)
        return outputs, *inputs

    def rank(self, module: str) -> int:
        """r, from the headers."""
        return self.shapes(module)[1][0] * (2 if self._began(module) else 1)

    def scale(self, module: str) -> float:
        """s, by the settings."""
        return self.settings.scale(self.modules[module].path)

    def read(self, module: str, part: str) -> Tensor | None:
        """A tensor, as stored, if it is there; "base" is a weight that takes the base's place."""
        key = self.modules[module].keys.get(part)
        return self.weights[key] if key else None

    def bias(self, module: str) -> Tensor:
        """What is added to the base's bias, (outputs,) float32."""
        return self.scale(module) * self.weights[self.modules[module].keys["bias"]].float()

    def experts(self, module: str, count: int) -> tuple[Tensor, Tensor]:
        """(s B, A) of each expert, (experts, outputs, r), (experts, r, inputs), as PEFT's."""
        b, a = self[module]
        return b.view(len(b), -1, count).permute(2, 0, 1), a.view(count, -1, a.shape[1])

    def __getitem__(self, module: str) -> tuple[Tensor, Tensor]:
        keys = self.modules[module].keys
        a, b = (self.weights[keys[side]].to(torch.float32).flatten(1) for side in "AB")
        b = self.scale(module) * b
        if self.base is None or not self._began(module):
            return b, a
        weight = self.base[self.modules[module].own].float()
        weight = weight.mT if self.modules[module].turned else weight
        taken_b, taken_a = self._taken(module, weight, len(a))
        return torch.cat([b, -taken_b], dim=1), torch.cat([a, taken_a])

    def _began(self, module: str) -> bool:
        """Whether the base's weight is less B0 A0, and this not stored beside the factors."""
        return self.settings.start is not None and "base" not in self.modules[module].keys

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
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def shapes(self, module: str) -> list[tuple[int, ...]]:
        """Those of B and A; (0, 0) of a missing one."""
        keys = self.modules[module].keys
        return [self.weights.shape(keys[side]) if side in keys else (0, 0) for side in "BA"]

    def _check(self, module: str) -> None:
        """Factors that fit each other and the settings."""
        (b, a), path = self.shapes(module), self.modules[module].path
        where = f"{self.weights.files[0]}: {module}"
        if len(a) < 2 or len(a) != len(b) or {*b[2:]} - {1} or a[0] != b[1] or not a[0]:
            raise CheckpointError(
                f"{where} has factors A {a} and B {b}, which must be (r, inputs) and "
                "(outputs, r); save the adapter again"
            )
        keys, on = self.modules[module].keys, self.settings.values.get
        sizes = [torch.Size(self.weights.shape(keys[x])).numel() for x in BESIDE if x in keys]
        if sizes != [b[0] for part in BESIDE if on(BESIDE[part])]:
            raise CheckpointError(
                f"{where} has {b[0]} outputs and {sizes or 'no'} numbers of {' or '.join(BESIDE)}, "
                f"unlike {' and '.join(BESIDE.values())} say; save the adapter again"
            )
        if self.settings.parameters_of(path):
            return  # their ranks are compared where the base's shapes are known
        rank = self.settings.rank(path)
        if a[0] != (min(rank, b[0], a[1]) if self.settings.start else rank):
            raise CheckpointError(
                f"{where} has factors of rank {a[0]}, and {ADAPTER_CONFIG} says {rank} (r, "
                "rank_pattern); give the adapter's own file"
            )
        tied = on("ensure_weight_tying") and is_head(f"{path}.weight")
        if not tied and not self.settings.applies_to(path):
            raise CheckpointError(
                f"{where} has factors, and {ADAPTER_CONFIG} leaves it out (target_modules, exclude_"
                "modules, …); PEFT would not load them: give the adapter's own file"
            )
