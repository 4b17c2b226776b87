"""What a merge leaves behind besides weights: its report, its model card, what it cost."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import metadata_load

from optmerge_core.checkpoints import HUB_ID, URL, parse_hub_id
from optmerge_core.parameters import layer_index

_CARD = """---
{front_matter}---

# {count} {kind} merged by {method}

Merged by `{method}` with [optmerge_core](https://arxiv.org/abs/2505.19892):
{what}; scaling coefficient λ = {scaling_coefficient:g}.
`merge_report.json` has all settings, hashes and norms.

## Recipe

{recipe} makes this {result} again.

## Inputs

{inputs}

## Layers

λ‖τm‖ / ‖θ0‖ is how far the merge moved a layer, relative to the base model; ‖τm‖ / ‖τi‖ compares
the merged task vector with the experts', by their mean (Frobenius norms over the layer's merged
parameters).

{layers}

## Load

```python
{load}
```
"""
_EVALUATE = """
`python -m optmerge_core benchmarks path/to/this/folder` prints how to evaluate it on the paper's
benchmarks.
"""


@dataclass(frozen=True)
class MergeReport:
    """What a merge read, did and cost; `merge_report.json` holds the same."""

    output_dir: str
    method: str
    method_options: dict[str, Any]
    scaling_coefficient: float
    trim: str
    seed: int
    device: str
    dtype: str | None
    model_type: str | None
    base_model: dict[str, Any]
    """location, revision (hub commit or None), sha256 of each weight file"""
    experts: dict[str, dict[str, Any]]
    """the same for each expert"""
    parameters: list[dict[str, Any]]
    """for each merged parameter: name, shape, merged_norm (Frobenius), expert_norms, and base_norm,
    None where no base model was read"""
    parameters_kept: int
    seconds: float
    """from the call to the report, with all checks and hashes"""
    peak_memory_bytes: int
    """of the whole process, resident, while it merged"""
    peak_device_memory_bytes: int | None
    """allocated by torch on the CUDA device; None on the CPU"""
    versions: dict[str, str]
    family: str | None = None
    """as asked for; None where config.json's model type decided"""
    scope: str = "linear"
    added_tokens: dict[str, dict[int, int]] | None = None
    """of an Omni model: modality -> its numbers of tokens that the base lacks -> their new ones"""

    def to_json(self) -> str:
        """Indented JSON of all fields; what JSON has no word for is written as text."""
        return json.dumps(asdict(self), indent=2, default=str) + "\n"

    def relative_norms(self) -> dict[str, float]:
        """Expert -> norm of its task vector over the base's, of all that merged."""
        base = math.hypot(*(record["base_norm"] or 0.0 for record in self.parameters))
        squares = {
            name: math.hypot(*(record["expert_norms"][name] for record in self.parameters))
            for name in self.experts
        }
        return {name: norm / base if base else math.nan for name, norm in squares.items()}

    def recipe(self) -> dict[str, Any]:
        """The recipe that makes this model again, hub ids with the commits that were read."""
        recipe = {
            "merge_method": self.method,
            "base_model": _pinned(self.base_model),
            "models": [{"model": _pinned(x), "name": name} for name, x in self.experts.items()],
            "parameters": {"lambda": self.scaling_coefficient},
            "method_options": {self.method: self.method_options},
            "trim": self.trim,
            "seed": self.seed,
        }
        defaults = {"dtype": None, "family": None, "scope": "linear"}
        given = {key: getattr(self, key) for key in defaults}
        recipe |= {key: value for key, value in given.items() if value != defaults[key]}
        return json.loads(json.dumps(recipe, default=str))

    def model_card(self, config: dict, base_folder: str | Path | None = None) -> str:
        """README.md: recipe, inputs, changes by layer, how to load it.

        `config` is the base model's config.json; what its folder holds besides decides between a
        processor and a tokenizer, and a card in it gives the licence.
        """
        folder = Path(base_folder) if base_folder is not None else None
        inputs = [self.base_model, *self.experts.values()]
        hub_ids = [
            parse_hub_id(item["location"])[0] for item in inputs if item["revision"] is not None
        ]
        front_matter = {
            "library_name": "transformers",
            "license": _licence(folder),
            "tags": ["merge", "optmerge"],
            "base_model": list(dict.fromkeys(hub_ids)),
            "base_model_relation": "merge" if hub_ids else None,
        }
        stream = " --stream" if any(URL.match(item["location"]) for item in inputs) else ""
        recipe = (
            f"```yaml\n{_yaml(self.recipe())}```\n\n"
            f"`python -m optmerge_core merge recipe.yaml --output merged{stream}`"
        )
        what = (
            f"{len(self.parameters)} parameters of the base model are merged, "
            f"{self.parameters_kept} others are the base model's, unchanged"
        )
        load = _load_snippet(config, folder)
        return self._card(front_matter, "experts", "model", what, recipe, load) + _EVALUATE

    def adapter_card(self) -> str:
        """README.md of a merged PEFT adapter: the call that makes it again, inputs, how to load."""
        base = self.base_model["location"]
        front_matter = {
            "library_name": "peft",
            "tags": ["merge", "optmerge"],
            "base_model": [base] if HUB_ID.fullmatch(base) and not Path(base).exists() else None,
        }
        front_matter |= {"base_model_relation": "adapter"} if front_matter["base_model"] else {}
        experts = {name: _pinned(item) for name, item in self.experts.items()}
        recipe = (
            "```python\nfrom optmerge_core import merge_adapters\n\nmerge_adapters(\n"
            f'    {experts!r},\n    "merged",\n    method={self.method!r},\n'
            f"    method_options={self.method_options!r},\n"
            f"    scaling_coefficient={self.scaling_coefficient!r},\n)\n```\n\nThis call"
        )
        what = f"low-rank changes of {len(self.parameters)} linear layers"
        load = (
            "from peft import PeftModel\n\n"
            f"# model: {base}, opened by transformers\n"
            'model = PeftModel.from_pretrained(model, "path/to/this/folder")'
        )
        return self._card(front_matter, "adapters", "adapter", what, recipe, load)

    def omni_card(self) -> str:
        """README.md of a composed Omni model: the call that makes it again, inputs, how to load."""
        front_matter = {"library_name": "transformers", "tags": ["merge", "optmerge", "omni"]}
        specialists = {name: _pinned(item) for name, item in self.experts.items()}
        recipe = (
            "```python\nfrom optmerge_core.omni import compose\n\ncompose(\n"
            f"    {_pinned(self.base_model)!r},\n    {specialists!r},\n"
            f'    "merged",\n    method={self.method!r},\n'
            f"    method_options={self.method_options!r},\n"
            f"    scaling_coefficient={self.scaling_coefficient!r},\n    seed={self.seed!r},\n"
            ")\n```\n\nThis call"
        )
        what = (
            f"{len(self.parameters)} parameters of the language model are merged, "
            f"{self.parameters_kept} others (embeddings, norms) are the specialists' mean, their "
            "towers and connectors are copied"
        )
        load = (
            "from optmerge_core.omni import OmniForConditionalGeneration\n\n"
            'model = OmniForConditionalGeneration.from_pretrained("path/to/this/folder")'
        )
        return self._card(front_matter, "specialists", "model", what, recipe, load)

    def _card(
        self, front_matter: dict, kind: str, result: str, what: str, recipe: str, load: str
    ) -> str:
        return _CARD.format(
            front_matter=_yaml({key: value for key, value in front_matter.items() if value}),
            count=len(self.experts),
            kind=kind,
            result=result,
            method=self.method,
            scaling_coefficient=self.scaling_coefficient,
            what=what,
            recipe=recipe,
            inputs=_inputs_table([("base model", self.base_model), *self.experts.items()]),
            layers=_layers_table(self.parameters, self.scaling_coefficient),
            load=load,
        )


def _pinned(item: dict[str, Any]) -> str:
    if item["revision"] is None:
        return item["location"]
    return f"{parse_hub_id(item['location'])[0]}@{item['revision']}"


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _licence(folder: Path | None) -> str | None:
    """What the base model's own card says, if it has one that can be read."""
    try:
        found = metadata_load(folder / "README.md") if folder else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    licence = (found or {}).get("license")
    return licence if isinstance(licence, str) else None


def _inputs_table(models: list[tuple[str, dict[str, Any]]]) -> str:
    rows = []
    for name, item in models:
        head = (name, f"`{item['location']}`", item["revision"] or "–")
        for file, digest in (item["sha256"] or {"–": "–"}).items():
            rows.append((*head, file, digest))
            head = ("", "", "")
    return _table(("model", "location", "revision", "weight file", "SHA-256"), rows)


def _layers_table(records: list[dict[str, Any]], scaling_coefficient: float) -> str:
    """One row a layer; norms of several parameters add up as their squares do."""
    layers: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        number = layer_index(record["name"])
        # Towers number their layers too: what stands before the number tells them apart.
        part = "" if number is None else record["name"].partition(f".{number}.")[0]
        layers.setdefault((part, -1 if number is None else number), []).append(record)
    several = len({part for part, _ in layers if part}) > 1
    rows = []
    for (part, number), group in sorted(layers.items(), key=lambda item: (not item[0][0], item[0])):
        merged = math.hypot(*(record["merged_norm"] for record in group))
        base = math.hypot(*(record["base_norm"] or 0.0 for record in group))
        experts = [
            math.hypot(*(record["expert_norms"][name] for record in group))
            for name in group[0]["expert_norms"]
        ]
        mean = sum(experts) / len(experts)
        label = (f"{part}.{number}" if several else number) if part else "others"
        change = f"{scaling_coefficient * merged / base:.2%}" if base else "–"
        rows.append((label, len(group), change, f"{merged / mean:.2f}" if mean else "–"))
    return _table(("layer", "parameters", "λ‖τm‖ / ‖θ0‖", "‖τm‖ / ‖τi‖"), rows)


def _load_snippet(config: dict, folder: Path | None) -> str:
    """The classes of transformers that open this folder, and its own code where it brings some."""
    remote = config["auto_map"] if isinstance(config.get("auto_map"), dict) else {}
    classes = config.get("architectures")
    model_class = str(classes[0]) if isinstance(classes, list) and classes else "AutoModel"
    if remote:
        names = [name for name in remote if name.startswith("AutoModel")]
        model_class = "AutoModel" if "AutoModel" in names or not names else names[0]
    reader = "AutoProcessor"
    if folder is None:
        reader = "AutoTokenizer" if model_class.endswith("ForCausalLM") else reader
    elif not _has_processor(folder):
        reader = "AutoTokenizer"
    argument = ", trust_remote_code=True" if remote else ""
    names = ", ".join(sorted({model_class, reader}))
    variable = reader.removeprefix("Auto").lower()
    lines = [
        f"from transformers import {names}",
        "",
        'folder = "path/to/this/folder"',
        f"model = {model_class}.from_pretrained(folder{argument})",
        f"{variable} = {reader}.from_pretrained(folder{argument})",
    ]
    foreign = _foreign_processor(folder)
    if foreign and not remote:
        lines.insert(1, f"# first import the package that has {foreign}: transformers has it not")
    if remote:
        lines.insert(2, "# trust_remote_code runs the Python files of this folder: read them first")
    return "\n".join(lines)


def _has_processor(folder: Path) -> bool:
    """Whether a processor was saved there; an image processor alone is none."""
    if (folder / "processor_config.json").is_file():
        return True
    path = folder / "preprocessor_config.json"
    return path.is_file() and bool(
        re.search(r'"processor_class"\s*:\s*"', path.read_text(errors="replace"))
    )


def _foreign_processor(folder: Path | None) -> str | None:
    """The folder's processor class, if transformers does not have it."""
    path = folder and folder / "processor_config.json"
    if not path or not path.is_file():
        return None
    found = re.search(r'"processor_class"\s*:\s*"(\w+)"', path.read_text(errors="replace"))
    import transformers  # slow, and only this question needs it

    return found[1] if found and not hasattr(transformers, found[1]) else None


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines
    )


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory`, where the system lets a process do so (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak is that of the whole process so far


def peak_memory(device: torch.device) -> tuple[int, int | None]:
    """Peak resident bytes of this process, and peak bytes allocated on a CUDA device (or None)."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024, on_device
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, on_device  # macOS counts bytes
