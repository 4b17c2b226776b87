"""A recipe opened, and what merging takes of it: for commands, sweeps, notebooks, experiments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from optmerge_core.checkpoints.weights import Renamed
from optmerge_core.merging.checks import TRIMMING, with_preset
from optmerge_core.merging.experts import Opened, open_models
from optmerge_core.merging.loop import merge_tensors
from optmerge_core.study.diagnosis import Diagnosis, diagnose
from optmerge_core.study.recipe import Recipe
from optmerge_core.task_vectors.stack import TaskVectors


@dataclass(frozen=True)
class Study(Opened):
    """A recipe with its base model and experts (name -> weights), and the names that merge.

    Of a recipe that merges modalities these are language models, and `specialists` has their
    towers, configurations and tokenizers too.
    """

    recipe: Recipe = field(kw_only=True)
    specialists: dict[str, Any] = field(default_factory=dict)

    def task_vectors(self, device: str = "cpu") -> TaskVectors:
        """Name -> (experts, *shape) float32, computed when read."""
        return TaskVectors(self.base, self.experts, self.names, device)

    def merge_tensors(self, method: str | None = None, **other: Any) -> dict[str, Tensor]:
        """Merged task vectors by a method (default: the recipe's), with the recipe's settings.

        other: arguments of `merge_tensors` that are not the recipe's, such as method_options.
        """
        chosen = {"experts": self.experts, "names": self.names}
        chosen |= settings_in_memory(self.recipe, method) | other
        return merge_tensors(self.base, **chosen)

    def diagnose(self) -> Diagnosis:
        """Whether the experts will merge by the recipe's method; see `diagnosis.diagnose`."""
        chosen = settings(self.recipe)
        return diagnose(
            self.base,
            self.experts,
            self.names,
            method=chosen["method"],
            options=chosen["method_options"],
            scaling_coefficient=chosen["scaling_coefficient"],
        )


def open_study(
    recipe: Recipe,
    *,
    stream: bool = False,
    scope: str | None = None,
    base_model: str | None = None,
    experts: Mapping[str, Any] | None = None,
) -> Study:
    """Open what a recipe names; scope, base_model and experts (name -> location) replace its own.

    Raises `ValueError` (`CheckpointError` for files) for experts of another base, and for
    specialists that are to be streamed.
    """
    models = (base_model or recipe.base_model, recipe.experts if experts is None else experts)
    chosen = {"family": recipe.family, "scope": scope or recipe.scope, "router": recipe.router}
    check_stream(recipe, stream)
    if recipe.merges == "capabilities":
        asked = prompting(recipe)
        if asked["processor"] in recipe.experts.keys() - models[1].keys():
            asked["processor"] = recipe.experts[asked["processor"]]  # an expert that is left out
        asked |= {} if recipe.layer_range is None else {"layers": recipe.layer_range[1]}
        opened = open_models(*models, stream=stream, **chosen, **asked)
        return Study(**vars(opened), recipe=recipe)
    from optmerge_core.omni.specialists import open_language_models  # slow: transformers and PEFT

    opened, specialists = open_language_models(*models, **chosen)
    # Of all else `compose` takes the mean: it is not what experts changed and a merge would drop.
    merging = {name: name for name in opened.names}
    languages = {m: Renamed(language, merging) for m, language in opened.experts.items()}
    return Study(**vars(opened) | {"experts": languages}, recipe=recipe, specialists=specialists)


def check_stream(recipe: Recipe, stream: bool) -> None:
    """Raise `ValueError` where specialists are to be streamed."""
    if stream and recipe.merges == "modalities":
        raise ValueError(f"{recipe.name}: specialists cannot be streamed; leave stream out")


def prompting(recipe: Recipe) -> dict[str, Any]:
    """Whose processor and chat template a recipe asks for; nothing where it merges modalities."""
    names = () if recipe.merges == "modalities" else ("processor", "chat_template")
    return {name: getattr(recipe, name) for name in names}


def settings(recipe: Recipe, method: str | None = None) -> dict[str, Any]:
    """What `merge` and `compose` take from a recipe for a method (default: the recipe's own)."""
    return (
        settings_in_memory(recipe, method)
        | prompting(recipe)
        | ({} if recipe.layer_range is None else {"layers": recipe.layer_range[1]})
        | _learnt(recipe, method)
        | {
            "scaling_coefficient": recipe.scaling_coefficient,
            "dtype": recipe.dtype,
            "family": recipe.family,
            "scope": recipe.scope,
            "router": recipe.router,
        }
    )


def _learnt(recipe: Recipe, method: str | None) -> dict[str, Any]:
    """From what data the options of the recipe's own method are; nothing of another's."""
    own = recipe.merges == "capabilities" and recipe.method(method) == recipe.merge_method
    return {"learnt": recipe.learnt} if own and recipe.learnt else {}


def settings_in_memory(recipe: Recipe, method: str | None = None) -> dict[str, Any]:
    """The part of `settings` that `merge_tensors` takes: method, method_options, seed, trim.

    The recipe's `trim` belongs to every method that trims; all others have "tensor", which says
    nothing of them. Modalities are merged by OptMerge's preset for them, as `compose` does it.
    """
    method = recipe.method(method)
    options = recipe.options(method)
    if recipe.merges == "modalities":
        options = with_preset(method, options, "modality")
    trim = recipe.trim if method in TRIMMING else "tensor"
    return {"method": method, "method_options": options, "seed": recipe.seed, "trim": trim}
