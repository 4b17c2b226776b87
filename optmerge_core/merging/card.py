"""Model cards: what a reader of a merged folder needs to know.

One template, `card.md.jinja`, for the three kinds; huggingface_hub writes front matter and text.
Ours is what goes in: the norms of each layer, and the classes that open the folder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from optmerge_core.checkpoints import HUB_ID, URL
from optmerge_core.checkpoints.formats import parse_hub_id
from optmerge_core.checkpoints.names import layer_index
from optmerge_core.merging.licences import common, forbids, name_of
from optmerge_core.merging.report import MergeReport, Record
from optmerge_core.merging.templates import processor_class

TEMPLATE = Path(__file__).with_name("card.md.jinja")
Row = tuple[str | int, int, str, str]
"""of a card's table: layer, its number of parameters, change relative to the base, to an expert"""


def model_card(
    report: MergeReport,
    config: dict[str, Any],
    base_folder: str | Path | None = None,
    processor_folder: str | Path | None = None,
) -> str:
    """README.md of a merged model: recipe, inputs, changes by layer, how to load it.

    `config` is the base model's config.json; what the folder holds that the processor is from
    (default: the base's) decides between a processor and a tokenizer.
    """
    folder = Path(base_folder) if base_folder is not None else None
    inputs = [report.base_model, *report.experts.values()]
    hub_ids = [parse_hub_id(x["location"])[0] for x in inputs if x["revision"] is not None]
    data = dict(
        library_name="transformers",
        tags=["merge", "optmerge"],
        base_model=list(dict.fromkeys(hub_ids)) or None,
        base_model_relation="merge" if hub_ids else None,
    )
    stream = any(URL.match(item["location"]) for item in inputs)
    processor = Path(processor_folder) if processor_folder is not None else folder
    return _card(report, "expert", data, stream=stream, **_classes(config, processor))


def adapter_card(report: MergeReport) -> str:
    """README.md of a merged PEFT adapter: the call that makes it again, inputs, how to load it."""
    base = report.base_model["location"]
    on_hub = HUB_ID.fullmatch(base) and not Path(base).exists()
    data = dict(
        library_name="peft",
        tags=["merge", "optmerge"],
        base_model=[base] if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
    )
    return _card(report, "adapter", data)


def omni_card(report: MergeReport) -> str:
    """README.md of a composed Omni model: the call that makes it again, inputs, how to load it."""
    data = dict(library_name="transformers", tags=["merge", "optmerge", "omni"])
    return _card(report, "specialist", data)


def _card(report: MergeReport, kind: str, data: dict[str, Any], **values: Any) -> str:
    """data: the card's front matter, without what is None."""
    from huggingface_hub import ModelCard, ModelCardData  # slow, and needed at a merge's end only

    recipe = report.recipe()
    card = ModelCard.from_template(
        ModelCardData(**data | common(report.licences())),
        str(TEMPLATE),
        kind=kind,
        report=report,
        recipe=recipe,
        yaml=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        experts={item["name"]: item["model"] for item in recipe["models"]},
        layers=_layers(report.parameters, report.scaling_coefficient),
        licences=_licences(report),
        **values,
    )
    return f"{card}\n"


def _licences(report: MergeReport) -> list[tuple[str, str, str]]:
    """Rows of a table: model, licence, what that forbids; none where one serves all, or no card."""
    licences = report.licences()
    if not any(licences.values()):
        return []
    rows = [(x, name_of(own), ", ".join(forbids(own)) or "–") for x, own in licences.items()]
    same = len({name.lower() for _, name, _ in rows}) == 1 and rows[0][2] == "–"
    return [] if same else [(x, name or "not named", forbidden) for x, name, forbidden in rows]


def _layers(records: list[Record], scaling_coefficient: float) -> list[Row]:
    """One row a layer; norms of several parameters add up as their squares do."""
    layers: dict[tuple[str, int], list[Record]] = {}
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
    return rows


def _classes(config: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """The classes of transformers that open this folder, and whether it brings its own code.

    `foreign` is the folder's processor class, if transformers does not have it.
    """
    remote = config["auto_map"] if isinstance(config.get("auto_map"), dict) else {}
    classes = config.get("architectures")
    model_class = str(classes[0]) if isinstance(classes, list) and classes else "AutoModel"
    if remote:
        names = [name for name in remote if name.startswith("AutoModel")]
        model_class = "AutoModel" if "AutoModel" in names or not names else names[0]
    processor = processor_class(folder) if folder else None
    by_name = folder is None and not model_class.endswith("ForCausalLM")
    return {
        "model_class": model_class,
        "reader": "Processor" if by_name or processor is not None else "Tokenizer",
        "remote": bool(remote),
        "foreign": processor if processor and not _in_transformers(processor) else None,
    }


def _in_transformers(name: str) -> bool:
    """Whether transformers has this class; where it is not installed, that is believed."""
    try:
        import transformers  # slow, and only the card of a folder with a processor needs it
    except ModuleNotFoundError:
        return True
    return hasattr(transformers, name)
