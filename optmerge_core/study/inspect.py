"""What a recipe's experts are and whether they will merge, as tables on a terminal."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from optmerge_core.checkpoints.names import is_embeddings, is_head, is_stack, routers
from optmerge_core.merging.families import NOT_LANGUAGE, follows_rule, mergeable
from optmerge_core.study.open import Study

_OUTSIDE = re.compile(rf"(?:[^.]+\.)*?[^.]*(?:{NOT_LANGUAGE.pattern})[^.]*\.", re.IGNORECASE)
COLORS = {"problem": "red", "warning": "yellow", "note": "cyan"}


def show(study: Study, console: Console) -> None:
    """Print what merges, then all that `diagnose` measures and finds."""
    kept = "are averaged" if study.specialists else "are the base's"
    console.print(
        f"{study.recipe.name}: {study.model_type}, {len(study.names)} parameters merge, "
        f"{len(study.base) - len(study.names)} {kept}"
    )
    with warnings.catch_warnings(action="ignore"):  # opening the study has said it
        chosen = (study.model_type, study.recipe.scope, study.recipe.router)
        kinds = summary(study.base.shapes(), *chosen)
    answers = ["yes" if row.merges else f"no: {row.why}" for row in kinds.itertuples(index=False)]
    columns = ["parameters", "count", "shapes", "merges"]
    _print_table(console, "parameters", kinds.assign(merges=answers)[columns])

    diagnosis = study.diagnose()
    columns = ["stored", "relative_norm", "others", "unchanged", "rounding"]
    ranks = diagnosis.experts[["rank", "entropy_rank", "full_rank"]].map("{:.0f}".format)
    ranks["counted"] = diagnosis.experts["counted"].map("{:.2f}".format)
    _print_table(
        console,
        "task vectors",
        diagnosis.experts[columns].join(ranks).rename_axis("expert").reset_index(),
        "relative_norm: of the base's; others: what the other experts add in a sum, likewise; "
        "unchanged: entries equal to the base's; rounding: share of the energy that is noise; "
        "counted: how often a sum counts its directions (1.00: shared with no other; see svc)",
    )
    layers = diagnosis.layers.rename_axis(columns=None).reset_index()
    _print_table(console, "relative norm by layer", layers)
    _print_table(console, "pairs of experts", diagnosis.pairs.reset_index())
    _print_table(console, "changed, but not merged", diagnosis.dropped)
    for finding in diagnosis.findings:
        severity = (f"{finding.severity}: ", COLORS[finding.severity])
        console.print(Text.assemble(severity, str(finding)))
    if all(finding.severity == "note" for finding in diagnosis.findings):
        console.print("Nothing measured speaks against this merge.")


def summary(
    names_and_shapes: Mapping[str, tuple[int, ...]],
    model_type: str | None,
    scope: str = "linear",
    router: str = "merge",
) -> pd.DataFrame:
    """What a merge does with each kind of parameter: one row a kind, in the checkpoint's order.

    A kind is a name with its numbers replaced by `*`; of what lies outside the language model, a
    tower or a connector, each module is one row. Columns: parameters (the kind), count, shapes (the
    two most frequent), entries (of all together), merges (True or False), why. Raises `ValueError`
    as `mergeable` does.
    """
    merging = set(mergeable(names_and_shapes, model_type, scope, router))
    kept = routers(names_and_shapes) if router == "base" else set()
    ruled = {name for name in names_and_shapes if follows_rule(name, model_type)}
    fronts = {_front(name) for name in ruled} - {None}
    rows = []
    for name, shape in names_and_shapes.items():
        part, why = _part(name, shape, name in ruled or _front(name) in fronts)
        if name in merging and scope != "linear":
            why = f"scope {scope}: {why}"
        elif name in kept:
            why = "router: base"
        rows.append((part, name in merging, why, shape, math.prod(shape)))
    table = pd.DataFrame(rows, columns=["parameters", "merges", "why", "shapes", "entries"])
    groups = table.groupby(["parameters", "merges", "why"], sort=False)
    table = groups.agg(
        count=("shapes", "size"), shapes=("shapes", _shapes), entries=("entries", "sum")
    )
    return table.reset_index()[["parameters", "count", "shapes", "entries", "merges", "why"]]


def _front(name: str) -> str | None:
    """What stands before a layer's number: `model.layers.` of `model.layers.3.mlp.up_proj.bias`."""
    match = re.match(r"(.*?\blayers\.)\d+\.", name)
    return match[1] if match else None


def _part(name: str, shape: tuple[int, ...], in_language_layers: bool) -> tuple[str, str]:
    """The row of `summary` a parameter belongs to, and what it is."""
    kind = re.sub(r"\.\d+(?=\.)", ".*", name)
    if not in_language_layers:
        if is_embeddings(name):
            return kind, "embeddings"
        if is_head(name):
            return kind, "head"
        if outside := _OUTSIDE.match(name):
            return f"{outside[0]}*", "outside the language model"
    elif ".lora_" in name:
        return kind, "factor of an adapter, for another modality"
    elif len(shape) == 2 and name.endswith(".weight"):
        return kind, "linear layer of the language model"
    elif is_stack(name, shape):
        return kind, "linear layers of a mixture's experts"
    if len(shape) == 1:
        return kind, "bias" if name.endswith("bias") else "norm" if "norm" in name else "vector"
    return kind, "not a linear layer of the language model"


def _shapes(shapes: pd.Series) -> str:
    """`896 × 896, 128 × 896, …`: the two most frequent shapes."""
    texts = [" × ".join(map(str, shape)) or "scalar" for shape in shapes]
    most = [text for text, _ in Counter(texts).most_common(3)]
    return ", ".join(most[:2] + ["…"] * (len(most) > 2))


def _print_table(
    console: Console, title: str, rows: pd.DataFrame, caption: str | None = None
) -> None:
    """Floats are shares, shown in per cent; nothing for no rows."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for name, column in rows.items():
        text = not pd.api.types.is_numeric_dtype(column)
        heading = str(name).replace("_", " ")
        table.add_column(heading, justify="left" if text else "right", overflow="fold")
        rows = rows.assign(**{name: [_cell(value) for value in column]})
    for row in rows.itertuples(index=False):
        table.add_row(*row)
    if len(rows):
        console.print(table)


def _cell(value: Any) -> str:
    return ("–" if pd.isna(value) else f"{value:.1%}") if isinstance(value, float) else str(value)
