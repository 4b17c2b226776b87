"""One YAML file describes one study: base model, experts, method, evaluation.

The keys are mergekit's where it has them, so that a mergekit file of a method both have is a
recipe. What is not understood is an error, never skipped.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from optmerge_core.checkpoints import HUB_ID
from optmerge_core.checks import check_method
from optmerge_core.parameters import FAMILIES

MERGEKIT_METHODS = {"linear": "weight_average", "dare_linear": "dare_task_arithmetic"}


class RecipeError(ValueError):
    """A recipe cannot be used; the message names the file, the key and what is valid."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Expert(_Strict):
    """One entry of `models`: where the expert is, and what it is called (default: its folder)."""

    model: str
    name: str = ""
    parameters: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, entry: Any) -> Any:
        if isinstance(entry, dict) and isinstance(entry.get("model"), str):
            return {"name": Path(entry["model"]).name} | entry
        return entry


class Evaluation(_Strict):
    """What the notebooks evaluate: data, further models (label -> location), sizes.

    contrast: another recipe, of stronger experts for the same tasks, to compare with.
    """

    data: str | None = None
    contrast: str | None = None
    references: dict[str, str] = {}
    validation_samples: Annotated[int, Field(gt=0)] = 300
    test_samples: Annotated[int, Field(gt=0)] = 1500


class Recipe(_Strict):
    """A study. `load_recipe` reads one and resolves its locations."""

    merge_method: str = "optmerge"
    base_model: str
    models: Annotated[list[Expert], Field(min_length=1)]
    parameters: dict[str, Any] = {}
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    name: str = ""
    family: Literal[*FAMILIES] | None = None
    merges: Literal["capabilities", "modalities"] = "capabilities"
    fine_tuning: Literal["full", "lora"] = "full"  # which of the paper's items its figures match
    scaling_coefficients: Annotated[list[float], Field(min_length=1)] = [0.1, 0.3, 0.5, 0.7, 1, 1.5]
    seed: int = 0
    trim: Literal["tensor", "model"] = "tensor"
    evaluation: Evaluation = Evaluation()
    method_options: dict[str, dict[str, Any]] = {}

    @field_validator("parameters", "method_options", mode="before")
    @classmethod
    def _scientific(cls, value: Any) -> Any:
        """YAML 1.1 reads 1e-5 as a text, since it has no dot."""
        if isinstance(value, dict):
            return {key: cls._scientific(item) for key, item in value.items()}
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.IGNORECASE):
            return float(value)
        return value

    @field_validator("merge_method")
    @classmethod
    def _our_name(cls, method: str) -> str:
        return MERGEKIT_METHODS.get(method, method)

    @model_validator(mode="after")
    def _understood(self) -> Recipe:
        names = [expert.name for expert in self._experts()]
        if not names:
            raise ValueError("models: only the base model is listed; add an expert")
        if len(set(names)) < len(names):
            raise ValueError(f"models: names are not unique ({', '.join(names)}); give each a name")
        for method in (self.merge_method, *self.method_options):
            check_method(method, self.options(method))
        _number("lambda", self.scaling_coefficient)
        return self

    @property
    def experts(self) -> dict[str, str]:
        """Expert name -> location.

        A base model among `models` is left out, as mergekit does for all methods but linear.
        """
        return {expert.name: expert.model for expert in self._experts()}

    @property
    def scaling_coefficient(self) -> float:
        """mergekit's `lambda`; 1 where the recipe does not say."""
        return self.parameters.get("lambda", 1.0)

    def options(self, method: str | None = None) -> dict[str, Any]:
        """Options of a method (default: the recipe's), from `parameters` and `method_options`.

        `parameters` belong to the recipe's own method. Raises `ValueError` for what mergekit may
        know and this package does not: values by layer or filter, unequal weights.
        """
        method = MERGEKIT_METHODS.get(method, method) or self.merge_method
        options = dict(self.method_options.get(method, {}))
        if method != self.merge_method:
            return options
        given = {key: value for key, value in self.parameters.items() if key != "lambda"}
        given |= self._common_parameters()
        weight = _number("weight", given.pop("weight", 1.0))
        if weight != 1 and method != "weight_average":
            raise ValueError(
                f"weight {weight:g} of {method}: only 1 is understood; scale by lambda"
            )
        if "density" in given and method.startswith("dare_"):
            # In mergekit this is the share DARE keeps, and nothing is trimmed after it.
            if "drop_rate" in given:
                raise ValueError(
                    f"give drop_rate and density together under method_options.{method}"
                )
            given["drop_rate"] = 1 - _number("density", given.pop("density"))
            given |= {"density": 1.0} if method == "dare_ties" else {}
        return options | given

    def _common_parameters(self) -> dict[str, Any]:
        """mergekit's parameters beside each model, which here must be the same for all."""
        common = {}
        for key in sorted({key for expert in self._experts() for key in expert.parameters}):
            values = [expert.parameters.get(key) for expert in self._experts()]
            if key not in ("weight", "density"):
                raise ValueError(f"{key!r} beside a model: only weight and density are understood")
            if any(value != values[0] for value in values):
                raise ValueError(f"{key} {values} differs between models: only equal is understood")
            common[key] = values[0]
        return common

    def _experts(self) -> list[Expert]:
        counts_base = self.merge_method == "weight_average"
        return [entry for entry in self.models if counts_base or entry.model != self.base_model]


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe. A location is relative to the recipe's folder if that exists there, else to
    the working directory, else a hub id. Raises `RecipeError` naming recipe, key and remedy.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the keys {_keys(Recipe)}")
    content.setdefault("name", path.stem)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise RecipeError(f"{path}: " + "; ".join(problems)) from error

    def locate(key: str, location: str) -> str:
        for candidate in (path.parent / Path(location).expanduser(), Path(location)):
            if candidate.exists():
                return os.path.relpath(candidate.resolve())
        if HUB_ID.fullmatch(location):
            return location
        raise RecipeError(
            f"{path}: {key}: {location!r} is neither a folder beside the recipe, nor one in the "
            "working directory, nor a hub id (owner/name)"
        )

    evaluation = recipe.evaluation
    references = {
        label: locate(f"evaluation.references.{label}", location)
        for label, location in evaluation.references.items()
    }
    data = evaluation.data and locate("evaluation.data", evaluation.data)
    contrast = evaluation.contrast and locate("evaluation.contrast", evaluation.contrast)
    models = [
        expert.model_copy(update={"model": locate(f"models.{number}.model", expert.model)})
        for number, expert in enumerate(recipe.models)
    ]
    return recipe.model_copy(
        update={
            "base_model": locate("base_model", recipe.base_model),
            "models": models,
            "evaluation": evaluation.model_copy(
                update={"references": references, "data": data, "contrast": contrast}
            ),
        }
    )


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} {value!r}: one finite number is expected, the same for all layers")
    return value


def _explain(problem: dict[str, Any]) -> str:
    """One pydantic error as `key: what is wrong`, with the valid keys where a key is unknown."""
    key = ".".join(str(part) for part in problem["loc"])
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        inside = {"models": Expert, "evaluation": Evaluation}
        model = inside[problem["loc"][0]] if len(problem["loc"]) > 1 else Recipe
        text = f"unknown key; valid are {_keys(model)}"
    return f"{key}: {text}" if key else text


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)
