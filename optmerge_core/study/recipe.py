"""One YAML file describes one study: base model, experts, method, evaluation.

The keys are mergekit's where it has them, so that a mergekit file of a method both have is a
recipe. What is not understood is an error, never skipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from optmerge_core.checkpoints import HUB_ID, URL
from optmerge_core.merging.families import FAMILIES, SCOPES
from optmerge_core.merging.varied import LAMBDA, is_varied, number
from optmerge_core.methods import THEN, check_names
from optmerge_core.study import mergekit
from optmerge_core.study.parsing import numeric, parse
from optmerge_core.study.values import value_of


class RecipeError(ValueError):
    """A recipe cannot be used; the message names the file, the key and what is valid."""


def _locate(location: str, info: ValidationInfo) -> str:
    """A folder relative to the working directory, wherever it was found, or what is remote."""
    if info.context is None:  # not read from a file
        return location
    if not location.strip():
        raise ValueError("an empty text, where a folder or hub id is needed")
    with suppress(OSError, RuntimeError):  # too long for a path; "~" of an unknown user
        for candidate in (info.context / Path(location).expanduser(), Path(location)):
            if candidate.exists():
                return os.path.relpath(candidate.resolve())
            log = Path(f"{candidate}.json")  # of its training, which may say how it is built
            if log.is_file() and (found := re.search(r'"build": "([^"]+)"', log.read_text())):
                raise ValueError(f"{location!r} is built, not shipped: {found[1]}")
    if HUB_ID.fullmatch(location) or URL.fullmatch(location):
        return location
    adapter = ", nor base_model+adapter" if "+" in location else ""
    raise ValueError(
        f"{location!r} is neither a folder beside the recipe, nor one in the working directory, "
        f"nor a hub id (owner/name or owner/name@revision){adapter}"
    )


Location = Annotated[str, AfterValidator(_locate)]


def _same(one: Any, other: Any, info: ValidationInfo) -> bool:
    """Whether two locations, as they are written, are one place."""

    def place(location: Any) -> Any:
        with suppress(ValueError):
            return _place(_locate(location, info)) if isinstance(location, str) else location
        return location

    return place(one) == place(other)


def _place(location: str) -> str:
    """One text for all spellings of a place: a folder's path, a hub id's case, or its @main."""
    if URL.fullmatch(location):
        return location.rstrip("/")
    folder = Path(location).expanduser()
    if HUB_ID.fullmatch(location) and not folder.exists():
        repository, _, revision = location.partition("@")
        return repository.casefold() + f"@{revision}" * (revision not in ("", "main"))
    return os.path.realpath(folder)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator(
        *("parameters", "method_options", "seed", "scaling_coefficients"),
        *("validation_samples", "test_samples", "then"),
        mode="before",
        check_fields=False,
    )
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, bool) for part in parts):  # which is a number in Python
            raise ValueError(f"{value!r}: a number is expected")
        return numeric(value)


class Expert(_Strict):
    """One entry of `models`: where the expert is, and what it is called (default: its folder)."""

    model: Location
    name: str = ""
    parameters: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, entry: Any) -> Any:
        if isinstance(entry, dict) and isinstance(entry.get("model"), str):
            return {"name": Path(entry["model"].partition("@")[0]).name} | entry
        return entry


class Evaluation(_Strict):
    """What the notebooks evaluate: data, further models (label -> location), sizes.

    contrast: another recipe, of stronger experts for the same tasks, to compare with.
    """

    data: Location | None = None
    contrast: Location | None = None
    references: dict[str, Location] = {}
    validation_samples: Annotated[int, Field(gt=0)] = 300
    test_samples: Annotated[int, Field(gt=0)] = 1500


class Recipe(_Strict):
    """A study. `load_recipe` reads one and resolves its locations."""

    merge_method: str = "optmerge"
    base_model: Location
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
    scope: Literal[*SCOPES] = "linear"  # the language model's linear layers, a talker's too, or all
    router: Literal["merge", "base"] = "merge"  # a mixture's: by the same method, or the base's
    processor: str | None = None  # base, an expert's name or a folder; None: merging/processor.py
    chat_template: str | None = None  # auto, or a template in Jinja, in the place of its own
    then: str | dict[str, Any] | None = None  # svc, after every method
    layer_range: tuple[Literal[0], int] | None = None  # of whole models, in a mergekit file's slice
    learnt: dict[str, Any] | None = None  # from what data its options are, as `learn` writes it
    trust_remote_code: bool = False  # run the Python files in a checkpoint to load its model
    evaluation: Evaluation = Evaluation()
    method_options: dict[str, dict[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _translated(cls, content: Any, info: ValidationInfo) -> Any:
        if not isinstance(content, dict):
            return content
        return mergekit.translate(content, partial(_same, info=info))

    @field_validator("name")
    @classmethod
    def _folder_name(cls, name: str) -> str:
        if not name.isprintable() or not re.fullmatch(r"(?!\.)[^/\\]+", name):
            raise ValueError(f"{name!r} is to be a folder's name: no dot in front, no / or \\")
        return name

    @field_validator("merge_method")
    @classmethod
    def _our_name(cls, method: str) -> str:
        return mergekit.NAMES.get(method, method)

    @field_validator("processor")
    @classmethod
    def _whose(cls, processor: str | None, info: ValidationInfo) -> str | None:
        names = [expert.name for expert in info.data.get("models", ())]
        if processor in (None, "base", *names):
            return processor
        with suppress(ValueError):
            if info.context is None or Path(found := _locate(processor, info)).is_dir():
                return processor if info.context is None else found
        raise ValueError(
            f"{processor!r} is neither base, nor an expert ({', '.join(names)}), nor a folder"
        )

    @model_validator(mode="after")
    def _understood(self) -> Recipe:
        if self.merges == "modalities" and (self.processor or self.chat_template):
            raise ValueError(
                "processor and chat_template: every specialist keeps its own; leave the keys out"
            )
        if self.merges == "modalities" and self.layer_range:
            raise ValueError("slices: of specialists list whole models under models")
        names = [expert.name for expert in self._experts()]
        if not names:
            raise ValueError("models: only the base model is listed; add an expert")
        if len(set(names)) < len(names):
            raise ValueError(f"models: names are not unique ({', '.join(names)}); give each a name")
        self._lambda()
        return self

    @property
    def experts(self) -> dict[str, str]:
        """Expert name -> location.

        A base model among `models` is left out, as mergekit does for all methods but linear; there
        it counts if it has a weight, be it that of all models in `parameters`.
        """
        return {expert.name: expert.model for expert in self._experts()}

    @property
    def scaling_coefficient(self) -> float:
        """mergekit's `lambda`; 1 where the recipe does not say.

        Also 1 where it differs by layer or filter: it then is an option of all methods.
        """
        found = self._lambda()
        return 1.0 if is_varied(found) else found

    def _lambda(self) -> Any:
        said = self.parameters.get(LAMBDA, 1.0)
        return number(LAMBDA, said) if said is None else value_of(LAMBDA, [said], 1.0)

    def method(self, method: str | None = None) -> str:
        """This package's name of a method, or mergekit's; default: the recipe's own."""
        return mergekit.NAMES.get(method, method) or self.merge_method

    def options(self, method: str | None = None) -> dict[str, Any]:
        """Options of a method (default: the recipe's), from `parameters` and `method_options`.

        `parameters`, and what stands beside the models, belong to the recipe's own method;
        `mergekit` says what they mean. `then` is every method's, and so is a `lambda` that varies.
        """
        method = self.method(method)
        own = {} if self.then is None else {THEN: self.then}
        own |= {LAMBDA: found} if is_varied(found := self._lambda()) else {}
        own |= self.method_options.get(method, {})
        if method != self.merge_method:
            return own
        beside = [expert.parameters for expert in self._experts()]
        return mergekit.method_options(method, self.parameters, beside, own)

    def _experts(self) -> list[Expert]:
        base = _place(self.base_model)
        if self.method_options.get(self.merge_method, {}).get("of") == "weights":  # NuSLERP's
            return self.models
        if self.merge_method != "weight_average":
            return [entry for entry in self.models if _place(entry.model) != base]
        listed = any(_place(entry.model) == base for entry in self.models)
        counts = "weight" in self.parameters and not listed  # for one weight of all there are
        return self.models + [Expert(model=self.base_model, name="base_model")] * counts


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe. A location is relative to the recipe's folder if that exists there, else to
    the working directory, else a hub id (owner/name, or owner/name@revision) or a web address,
    which has to be streamed. Raises `RecipeError` naming recipe, key and remedy.
    """
    recipe = read_recipe(path)
    from optmerge_core.merging.checks import check_method  # imports torch, which takes seconds

    _check_methods(path, recipe, partial(check_method, experts=len(recipe.experts)))
    return recipe


def read_recipe(path: str | Path) -> Recipe:
    """The same without a look at the values of methods' options, which saves torch's import."""
    path = Path(path)
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be read ({error.strerror}); a recipe is a YAML file"
        ) from error
    except Exception as error:  # of any type: PyYAML stumbles over its own tags in many ways
        raise RecipeError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the keys {_keys(Recipe)}")
    content.setdefault("name", path.stem)
    try:
        recipe = Recipe.model_validate(content, context=path.parent)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise RecipeError(f"{path}: " + "; ".join(problems)) from error
    _check_methods(path, recipe, _check_names)
    return recipe


def _check_names(method: str, options: dict[str, Any]) -> None:
    check_names(method, [x for x in options if x != LAMBDA or not is_varied(options[x])])


def _check_methods(path: str | Path, recipe: Recipe, check: Callable[..., None]) -> None:
    """`check(method, options)` for each method that the recipe names; its errors name the file."""
    for method in (recipe.merge_method, *recipe.method_options):
        try:
            check(method, recipe.options(method))
        except ValueError as error:
            beside = "; the scaling coefficient is lambda" * ("has no option" in str(error))
            raise RecipeError(f"{path}: {error}{beside}") from error


def _explain(problem: dict[str, Any]) -> str:
    """One pydantic error as `key: what is wrong`, with the valid keys where a key is unknown."""
    key = ".".join(str(part) for part in problem["loc"])
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_type":
        text = f"{text}, found {problem['input']!r}; put it in quotes, numbers with a decimal point"
    if problem["type"] == "extra_forbidden":
        inside = {"models": Expert, "evaluation": Evaluation}
        model = inside[problem["loc"][0]] if len(problem["loc"]) > 1 else Recipe
        text = f"unknown key; valid are {_keys(model)}"
    return f"{key}: {text}" if key else text


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)
