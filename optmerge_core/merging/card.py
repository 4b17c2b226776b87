"""Model cards: what a reader of a merged folder needs to know."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from optmerge_core.checkpoints.names import layer_index

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
