"""A recipe opened: base model, experts and the names of the parameters that merge."""

from __future__ import annotations

from typing import Any

from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.merging.families import mergeable
from optmerge_core.merging.plan import check_experts, tied_head
from optmerge_core.study.recipe import Recipe


def open_models(recipe: Recipe, stream: bool = False) -> tuple[Any, dict[str, Any], list[str]]:
    """Base model, experts (name -> weights) and the names of the parameters that merge.

    Of a recipe that merges modalities, what merges of the specialists' language models; of the rest
    `omni.compose` takes the mean. Raises `ValueError` (`CheckpointError` for files) for experts of
    another base.
    """
    checkpoint = open_checkpoint(recipe.base_model, stream=stream)
    model_type = recipe.family or checkpoint.config().get("model_type")
    if recipe.merges == "modalities":
        from optmerge_core.omni import specialists  # slow: transformers and PEFT

        base, experts = specialists.LanguageModel(checkpoint), {}
        names = mergeable(base.shapes(), model_type, recipe.scope)
        for name, location in recipe.experts.items():
            specialist = specialists.open_specialist(location)
            specialists.check_language_model(name, specialist, base)
            weights = specialist.language_model.weights
            experts[name] = specialists.LanguageModel(weights, frozenset(names))
        return base, experts, names
    experts = {name: open_expert(x, checkpoint, stream) for name, x in recipe.experts.items()}
    tied = tied_head(checkpoint) if recipe.scope == "all" else {}
    names = [n for n in mergeable(checkpoint.shapes(), model_type, recipe.scope) if n not in tied]
    return checkpoint, experts, check_experts(checkpoint, experts, names, model_type)
