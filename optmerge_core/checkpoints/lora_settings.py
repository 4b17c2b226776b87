"""What adapter_config.json says about the weights of a LoRA adapter, as PEFT 0.21 reads it.

`FIELDS` decides about every field of PEFT's `LoraConfig`; a test fails when PEFT adds one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from optmerge_core.checkpoints.formats import CheckpointError, read_json

EXACT, HARMLESS = "exact", "harmless"
MERGE = "merge it into its base model (PEFT's merge_and_unload) and give that folder"
CONVERT = (
    "make it a plain LoRA adapter where it was trained (PEFT's save_pretrained with "
    "path_initial_model_for_weight_conversion) and give that"
)
TEXTS = "a text or a list of texts"
ROUTED = "it acts on some tokens only, so that no merged model equals it: leave it out"

_MEANINGS = {
    EXACT: "peft_type r lora_alpha rank_pattern alpha_pattern use_rslora init_lora_weights "
    "use_dora lora_bias target_modules exclude_modules layers_to_transform layers_pattern "
    "fan_in_fan_out target_parameters modules_to_save trainable_token_indices ensure_weight_tying",
    # of the training; how, where another field says whether; and bias: what it trains is there
    HARMLESS: "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "runtime_config lora_dropout loftq_config eva_config corda_config lora_ga_config "
    "qalora_group_size megatron_core bias",
    MERGE: "use_qalora use_bdlora kasa_config velora_config monteclora_config megatron_config",
    ROUTED: "alora_invocation_tokens arrow_config",
    "its model has other layers than its base: leave it out": "layer_replication",
}
FIELDS = {field: meaning for meaning, fields in _MEANINGS.items() for field in fields.split()}
"""Field -> followed exactly, harmless, or what to do with an adapter that has it set: refused."""

STARTS = (
    dict.fromkeys(("gaussian", "eva", "orthogonal", "mica"), HARMLESS)
    | dict.fromkeys(("pissa", "olora"), EXACT)
    | {"loftq": MERGE}
)
"""The same of `init_lora_weights`. The exact ones change the base's weights before the training, in
a way that loading repeats; others (corda, lora_ga, pissa_niter_4, …) by chance or by data."""

Check = Callable[[Any], bool]
Pattern = list[tuple[str, float]]
"""(expression of modules, value for them); the first that fits holds"""


class LoraSettings:
    """adapter_config.json, checked. Raises `CheckpointError` for what is refused or cannot be read.

    Modules are paths as PEFT saw them when it saved the adapter. `by_peft`: it is PEFT that merges,
    which does what it is the remedy for.
    """

    def __init__(self, path: Path, by_peft: bool = False):
        known = (EXACT, HARMLESS, MERGE) if by_peft else (EXACT, HARMLESS)
        self.path, self.values = path, read_json(path)
        if (kind := self.values.get("peft_type")) != "LORA":
            raise CheckpointError(f"{path}: the adapter is of type {kind}, not LORA; {MERGE}")
        for key, value in self.values.items():
            # A newer PEFT's: what is on is refused; a number says how much of something else.
            unknown = HARMLESS if type(value) in (int, float) else MERGE
            if value and (remedy := FIELDS.get(key, unknown)) not in known:
                raise CheckpointError(f"{path}: the adapter uses {key}; {remedy}")
        self.start = self._start()
        self.parameters = _listed(self._get("target_parameters", _are_names, TEXTS, []))
        self.saved = _listed(self._get("modules_to_save", _are_names, TEXTS, []))
        none: Any = [] if self.parameters else None
        self.targets = self._get("target_modules", _are_names, TEXTS, none)
        self.excluded = self._get("exclude_modules", _are_names, TEXTS, [])
        self.layers = self._get("layers_to_transform", _are_layers, "a number or more", [])
        self.layers_pattern = _listed(self._get("layers_pattern", _are_names, TEXTS, []) or [])
        if (self.layers_pattern and self.layers == []) or (
            self.layers != [] and isinstance(self.targets, str)
        ):
            raise CheckpointError(
                f"{path}: layers_pattern needs layers_to_transform, and this a list of "
                "target_modules; save the adapter again"
            )
        self._check_expressions("layers_pattern", self.layers_pattern)
        self._check_expressions("modules_to_save", self.saved)
        for key, names in (("target_modules", self.targets), ("exclude_modules", self.excluded)):
            self._check_expressions(key, [names] if isinstance(names, str) else [])
        self.ranks = self._pattern("rank_pattern", "r", _is_rank, "a whole number above 0")
        self.alphas = self._pattern("alpha_pattern", "lora_alpha", _is_number, "a number")

    def rank(self, module: str) -> int:
        """r, by PEFT's `rank_pattern` if it has the module."""
        return int(_first(self.ranks, module))

    def scale(self, module: str) -> float:
        """s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (rsLoRA)."""
        alpha, rank = _first(self.alphas, module), self.rank(module)
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def applies_to(self, module: str) -> bool:
        """Whether PEFT gives this module factors; it loads none that a file has beyond."""
        if self.excluded and _are_named(self.excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if isinstance(self.targets, str):
            return self.targets.lower() == "all-linear" or _are_named(self.targets, module)
        named = _are_named(self.targets, module)
        return module in self.targets or (named and self._is_in_layers(module))

    def parameters_of(self, module: str) -> list[str]:
        """Names of a module's own parameters with factors; PEFT nests it for each of these."""
        module = re.sub(r"(\.base_layer)+$", "", module)
        names = dict.fromkeys(target.rpartition(".")[2] for target in self.parameters)
        return [name for name in names if _are_named(self.parameters, f"{module}.{name}")]

    def tokens(self, module: str) -> list[int]:
        """The rows that were trained of this module's weight (`trainable_token_indices`)."""
        given = self.values.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next((rows for name, rows in given.items() if module.endswith(name)), [])
        return [*self._checked("trainable_token_indices", given, _are_tokens, "token numbers")]

    def _is_in_layers(self, module: str) -> bool:
        """`layers_to_transform`: by the first number of a path, or that after `layers_pattern`."""
        if self.layers == []:
            return True
        patterns = [rf"(?:^|.*?\.){p}" for p in self.layers_pattern] or [r".*?\.[^.]*"]
        found = (re.match(rf"{pattern}\.(?P<_layer>\d+)\.", module) for pattern in patterns)
        first = next((match for match in found if match), None)
        return first is not None and int(first["_layer"]) in _listed(self.layers)

    def _start(self) -> str | None:
        """How PEFT changes the base's weights before it loads the factors: "pissa" or "olora"."""
        given = self.values.get("init_lora_weights")
        if given is None or isinstance(given, bool):
            return None
        name = str(given).lower()
        if (remedy := STARTS.get(name, CONVERT)) in (EXACT, HARMLESS):
            return name if remedy == EXACT else None
        raise CheckpointError(
            f"{self.path}: init_lora_weights {name[:40]!r} changed the base's weights before the "
            f"training, in a way that the files do not tell; {remedy}"
        )

    def _get(self, key: str, right: Check, what: str, default: Any = None) -> Any:
        """A setting, or `default` where it is null or missing."""
        value = self.values.get(key)
        return self._checked(key, default if value is None else value, right, what)

    def _pattern(self, key: str, rest: str, right: Check, what: str) -> Pattern:
        """The expressions of `key`, and last one of every module: `rest`, or 8 as in PEFT."""
        given = self._get(key, lambda value: isinstance(value, dict), "a mapping", {})
        self._check_expressions(key, given)
        values = [(x, self._checked(key, value, right, what)) for x, value in given.items()]
        return [*values, ("(?s:.*)", self._checked(rest, self.values.get(rest, 8), right, what))]

    def _checked(self, key: str, value: Any, right: Check, what: str) -> Any:
        if not right(value):
            raise CheckpointError(
                f"{self.path}: {key} is not {what} ({str(value)[:40]}); save the adapter again"
            )
        return value

    def _check_expressions(self, key: str, texts: Iterable[str]) -> None:
        for text in texts:
            try:
                re.compile(f"(?:{text})$")
            except (re.error, OverflowError, RecursionError) as error:
                raise CheckpointError(
                    f"{self.path}: {key} is no regular expression ({error}); save the adapter again"
                ) from error


def _first(pattern: Pattern, module: str) -> float:
    return next(value for x, value in pattern if re.match(rf"(?:.*\.)?(?:{x})$", module))


def _are_named(names: str | list[str], module: str) -> bool:
    """Whether an expression, or one of the ends of paths, stands for this module."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _are_names(value: Any) -> bool:
    return all(isinstance(name, str) for name in _listed(value))


def _are_layers(value: Any) -> bool:
    return all(type(number) is int for number in _listed(value))


def _are_tokens(value: Any) -> bool:
    right = isinstance(value, list) and all(type(x) is int and 0 <= x < 1 << 31 for x in value)
    return right and len({*value}) == len(value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # NaN neither
