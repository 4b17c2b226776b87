"""What a diagnosis means: rules with named thresholds, each finding with its remedy.

The thresholds' landmarks are the embedded benchmark's, where the merged models' scores are known;
notebook 01 shows how well the rules predict there. They are few models, all of them tiny.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

GENTLE, STRONG = (0.059, 0.094), (0.110, 0.173)
"""Relative norms of the embedded InternVL's experts: data/recipes/internvl.yaml, _stressed.yaml."""
STRONG_NORM = 0.10  # between the two
OTHER_BASE_COSINE = 0.95  # strongest expert 0.967; Qwen2-VL's base, trained on from this one, 0.93
OTHER_BASE_NORM = 0.30  # relative norm: experts at most 0.27, that base 0.41
OTHER_BASE_RANK = 0.30  # entropy rank / full rank: experts at most 0.27, that base 0.37
SAME_CHANGE = 0.5  # cosine: embedded experts at most 0.1, those with that other base 0.97
DUPLICATE = 0.99
OPPOSED = -0.2  # cosine: embedded experts at least -0.02
DOMINATES = 3.0  # norms: gentle experts 1.6, LoRA experts 1.9, those of different makers 6
# What the others add to an expert in a sum, from data/benchmark/subsets.csv. Full fine-tuning: up
# to 0.08 sums keep half of the experts' gain or more, beyond 0.15 half of them fall below the base.
# LoRA: a fifth fall below it up to 0.08, half of them beyond. The λ to try brings it to the aim.
CROWDED, CROWDED_LORA = 0.15, 0.08
AIM, AIM_LORA = 0.08, 0.04
LOW_RANK = 0.25  # rank / full rank: LoRA at most 0.07, full fine-tuning at least 0.98
SHARED = 0.1  # shared subspace − chance: full fine-tuning at least 0.13, LoRA at most 0.02
ROUNDED, MOSTLY_ROUNDED = 0.10, 0.40  # share of norm²; the estimate is good up to the former
LOST = 0.5  # share of entries that equal the base's

ADAPTER = "adapter"
"""What the column `stored` of `Diagnosis.experts` says of an adapter."""
LARGE_UPDATE = (
    "An adapter's norm says nothing of its base; training rarely gives so large a one.",
    "Check lora_alpha, r and use_rslora in its adapter_config.json and the learning rate; merge an "
    "earlier checkpoint, or lower λ.",
)
SUMS = ("task_arithmetic", "dare_task_arithmetic")


@dataclass(frozen=True)
class Finding:
    """severity: "problem" (do not merge it so), "warning" or "note"; experts: whom it is about."""

    severity: str
    experts: tuple[str, ...]
    found: str
    meaning: str
    remedy: str

    def __str__(self) -> str:
        about = ", ".join(self.experts)
        parts = [f"{about}:" * bool(about), self.found, self.meaning, self.remedy]
        return " ".join(part for part in parts if part)


Merge = Mapping[str, Any]
"""What the rules ask of a merge: its method, scaling (λ) and the method's options."""


def find(
    diagnosis: Diagnosis,
    method: str = "optmerge",
    options: Mapping[str, Any] | None = None,
    scaling_coefficient: float = 1.0,
) -> list[Finding]:
    """The findings for a merge by `method`, problems first, in the order of the rules."""
    merge = {"method": method, "scaling": scaling_coefficient, **(options or {})}
    found = [finding for rule in RULES for finding in rule(diagnosis, merge)]
    return sorted(found, key=lambda finding: ("problem", "warning", "note").index(finding.severity))


def nothing_changed(diagnosis: Diagnosis, merge: Merge) -> Iterator[Finding]:
    for name in diagnosis.experts.index[diagnosis.experts["norm"] == 0]:
        yield Finding(
            "problem",
            (name,),
            "its task vector is zero.",
            "In every parameter that merges it equals the base model.",
            "Check its location, or leave it out: it only thins out an average.",
        )


def another_base(diagnosis: Diagnosis, merge: Merge) -> Iterator[Finding]:
    for name, row in diagnosis.experts.iterrows():
        if not row["cosine_with_base"] < OTHER_BASE_COSINE:
            continue
        if row["stored"] == ADAPTER:  # a product of factors: its norm tells nothing of its base
            found = f"its update is {row['relative_norm']:.0%} as long as the base's weights."
            yield Finding("warning", (name,), found, *LARGE_UPDATE)
            continue
        signs = [f"its weights have cosine {row['cosine_with_base']:.2f} with the base's"]
        signs.append(f"its task vector is {row['relative_norm']:.0%} as long as the base's weights")
        rank = row["entropy_rank"] / row["full_rank"]
        if rank > OTHER_BASE_RANK:
            signs.append(f"and spread over {rank:.0%} of the directions")
        dropped = diagnosis.dropped.query("expert == @name and parameters == changed")
        if len(dropped):
            signs.append(f"it differs in all of {', '.join(dropped['module'])}")
        yield Finding(
            "problem",
            (name,),
            ", ".join(signs) + ".",
            "Fine-tuning does not move a model so far; it was probably made from another base, and "
            "then its task vector is mostly the difference of two bases.",
            "Set base_model to the model it was fine-tuned from, or leave it out.",
        )


def alike(diagnosis: Diagnosis, merge: Merge) -> Iterator[Finding]:
    cosines = diagnosis.pairs["cosine"]
    adapters = diagnosis.experts["stored"] == ADAPTER
    count = len(diagnosis.experts)
    common = "fine-tuned from another model than this base", "Set base_model to that model."
    if adapters.all():
        common = "trained on from one adapter", "Keep one of them."
    if count > 2 and (cosines > SAME_CHANGE).all():
        yield Finding(
            "problem",
            tuple(diagnosis.experts.index),
            f"all task vectors point the same way (cosines {cosines.min():.2f} to "
            f"{cosines.max():.2f}).",
            "They contain one common change, which a sum adds as often as there are experts: "
            f"probably all were {common[0]}.",
            common[1],
        )
        return
    for pair, cosine in cosines.items():
        if cosine > DUPLICATE:
            found = f"their task vectors are nearly the same (cosine {cosine:.3f})."
            meaning, remedy = "A sum counts this change twice.", "Leave one of them out."
        elif cosine > SAME_CHANGE:
            found = f"their task vectors share a change (cosine {cosine:.2f})."
            meaning = "One was trained on from the other, or both from another model than the base."
            remedy = "Leave one out, or set base_model to what they have in common."
            if adapters[list(pair)].all():
                meaning = "One was trained on from the other, or both from one adapter."
                remedy = "Leave one of them out."
        elif cosine < OPPOSED:
            found = f"their task vectors point against each other (cosine {cosine:.2f})."
            meaning = "What one has learnt the other undoes, in a sum both lose."
            remedy = "Leave one of them out."
        else:
            continue
        yield Finding("warning", pair, found, meaning, remedy)


def strong(diagnosis: Diagnosis, merge: Merge) -> Iterator[Finding]:
    norms = diagnosis.experts["relative_norm"]
    norms = norms[diagnosis.experts["cosine_with_base"] >= OTHER_BASE_COSINE]
    far = norms[norms > STRONG_NORM]
    if len(far):
        yield Finding(
            "warning",
            tuple(far.index),
            f"moved by {_between(far)} of the base's norm.",
            f"Landmarks: the embedded benchmark's gentle experts moved by {_between(GENTLE)}, its "
            f"stressed ones by {_between(STRONG)}, and these kept less of their gain in a merge.",
            "Merge an earlier checkpoint of the training, or lower λ.",
        )


def dominates(diagnosis: Diagnosis, merge: Merge) -> Iterator[Finding]:
    norms = diagnosis.experts["norm"]
    norms = norms[norms > 0]
    for name in norms.index if len(norms) > 1 else []:
        ratio = norms[name] / norms.drop(name).median()
        if ratio > DOMINATES:
            yield Finding(
                "warning",
                (name,),
                f"its task vector is {ratio:.1f} times as long as the other experts' (median).",
                "It dominates a sum or an average; the others are noise beside it.",
                "Leave it out or merge an earlier checkpoint of it; optmerge and wudi divide each "
                "expert's interference by its ‖τ‖².",
            )


def crowded(diagnosis: Diagnosis, merge: Merge) -> Iterator[Finding]:
    low_rank, summing = _low_rank(diagnosis), merge["method"] in SUMS
    limit, aim = (CROWDED_LORA, AIM_LORA) if low_rank else (CROWDED, AIM)
    scaling = merge["scaling"] if summing else 1.0
    others = diagnosis.experts["others"].mean()
    if not scaling * others > limit:
        return
    yield Finding(
        "warning" if summing else "note",
        (),
        f"in a plain sum (λ = {scaling:g}) the other experts add {scaling * others:.2%} of the "
        "base's norm to each.",
        f"Of the embedded benchmark's {'LoRA' if low_rank else 'fully fine-tuned'} experts half of "
        f"the sums with more than {limit:.0%} fell below the base model.",
        f"For task_arithmetic search λ around {aim / others:.1g} on validation data; "
        + (
            "weight_average and optmerge with preset: lora stay near the mean, which is safer."
            if low_rank
            else "methods that weigh interference (optmerge, wudi, tsv) bear longer sums."
        ),
    )


def shared_directions(diagnosis: Diagnosis, merge: Merge) -> Iterator[Finding]:
    # A task vector of zeros has no cosine, one that is there twice tells nothing of two experts.
    pairs = diagnosis.pairs[diagnosis.pairs["cosine"] <= DUPLICATE]
    if not len(pairs) or pairs["chance"].isna().all():
        return
    shared, chance = pairs[["shared_subspace", "chance"]].mean()
    if shared > chance + SHARED:
        meaning = (
            "They read the same features, so the rows of the task vectors tell where experts meet: "
            "on the embedded family of this kind OptMerge led task arithmetic by nine points."
        )
        remedy = "Prefer optmerge, wudi or tsv."
    else:
        meaning = (
            "Their rows tell little about the inputs, as with LoRA, whose rows keep to a random "
            "start: on the embedded family of this kind no method led by more than a point."
        )
        remedy = "Expect little from the choice of method; fewer or better experts matter more."
    found = (
        f"the experts share {shared:.0%} of their leading input directions (chance: {chance:.0%})."
    )
    yield Finding("note", (), found, meaning, remedy)


def rounding(diagnosis: Diagnosis, merge: Merge) -> Iterator[Finding]:
    for name, row in diagnosis.experts.iterrows():
        if not row["rounding"] > ROUNDED:
            continue
        most = row["rounding"] > MOSTLY_ROUNDED
        lost = row["unchanged"] > LOST
        yield Finding(
            "problem" if most else "warning",
            (name,),
            f"{'about half or more' if most else format(row['rounding'], '.0%')} of its task "
            f"vector's energy is rounding noise of {row['stored']}"
            + (f", and {row['unchanged']:.0%} of the entries equal the base's." if lost else "."),
            "Fine-tuning moved the weights by less than the dtype resolves"
            + (": updates below half a unit in the last place were lost." if lost else "."),
            "Get the checkpoint in float32 (or its adapter, if it was LoRA).",
        )


def dropped(diagnosis: Diagnosis, merge: Merge) -> Iterator[Finding]:
    for name, rows in diagnosis.dropped.groupby("expert", sort=False):
        norms = [
            "another shape, or none" if math.isnan(x) else f"{x:.1%}" for x in rows.relative_norm
        ]
        modules = [f"{module} ({norm})" for module, norm in zip(rows.module, norms, strict=True)]
        yield Finding(
            "warning",
            (name,),
            f"it also changed parameters outside the merge: {', '.join(modules)}.",
            "The merged model has the base's values there, and what depends on them is lost.",
            "With scope: all these merge too, where shapes agree; or leave the expert out.",
        )


def preset(diagnosis: Diagnosis, merge: Merge) -> Iterator[Finding]:
    if merge["method"] != "optmerge" or diagnosis.experts["rank"].isna().all():
        return
    chosen, low_rank = merge.get("preset", "full"), _low_rank(diagnosis)
    rank = diagnosis.experts["rank"].median() / diagnosis.experts["full_rank"].median()
    if low_rank and chosen == "full" or not low_rank and chosen == "lora":
        better = "lora" if low_rank else "full"
        yield Finding(
            "warning",
            (),
            f"the task vectors use {rank:.0%} of the full rank, and the preset is {chosen}.",
            f"They look like {'LoRA' if low_rank else 'full fine-tuning'}.",
            f"Write preset: {better} into the recipe's parameters.",
        )


def sampled(diagnosis: Diagnosis, merge: Merge) -> Iterator[Finding]:
    layers = diagnosis.sampled_layers
    if 0 < len(layers) < len(diagnosis.layers):
        yield Finding(
            "note",
            (),
            f"ranks and shared directions are of {len(layers)} of {len(diagnosis.layers)} layers "
            f"({', '.join(map(str, layers))}).",
            "Norms, cosines, signs and rounding are of all.",
            "",
        )


RULES: tuple[Callable[[Diagnosis, Merge], Iterator[Finding]], ...] = (
    nothing_changed, another_base, alike, rounding, strong, dominates, crowded, dropped, preset,
    shared_directions, sampled,
)  # fmt: skip


def _low_rank(diagnosis: Diagnosis) -> bool:
    """Whether most experts look like LoRA."""
    shares = diagnosis.experts["rank"] / diagnosis.experts["full_rank"]
    return bool(shares.median() < LOW_RANK)


def _between(values: Any) -> str:
    low, high = min(values), max(values)
    return f"{low:.1%}" if f"{low:.1%}" == f"{high:.1%}" else f"{low:.1%} to {high:.1%}"


@dataclass(frozen=True)
class Diagnosis:
    """What was measured of a study; shares are between 0 and 1, NaN where not measured.

    parameters: one row per parameter and expert. Columns: parameter, layer, kind, expert, size,
        base_norm, norm, relative_norm (norm / base_norm), cosine_with_base (of the expert's weights
        with the base's), unchanged (share of entries equal to the base's), rounding (share of
        norm² that rounding to the stored dtype explains), and in the sampled layers full_rank,
        rank (singular values above the rounding noise), entropy_rank and counted (how often the
        experts' sum counts its directions: the mean of max(1, s) of `svc`, weighted by its energy).
    layers: relative norm, a row per layer of the language model and a column per expert.
    experts: the same quantities for whole experts, with changed (share of the merging parameters
        that differ from the base at all), others (‖sum of the other task vectors‖ / base_norm) and
        stored (the dtype, or "adapter").
    pairs: one row per two experts: cosine, sign_conflict, shared_subspace (mean squared cosine of
        the leading input directions, a share 1/experts of them) and chance (what random directions
        would share).
    dropped: one row per expert and module outside the merge in which they differ: parameters,
        changed, relative_norm (NaN if shapes differ or the base has no such parameter).
    sampled_layers: where ranks and subspaces were measured.
    findings: what follows for the merge, see `findings.py`.
    """

    parameters: pd.DataFrame
    layers: pd.DataFrame
    experts: pd.DataFrame
    pairs: pd.DataFrame
    dropped: pd.DataFrame
    sampled_layers: list[int]
    findings: list[Finding] = field(default_factory=list)
