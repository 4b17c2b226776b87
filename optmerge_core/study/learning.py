"""optmerge learn: a recipe whose experts have weights learnt on a few unlabelled questions.

By Expert Merging (`evaluation.expert_merging`), which is not data-free. What it writes is a recipe
of Task Arithmetic with a weight of each expert by filter, as mergekit has it, and the key `learnt`,
which says from what; `merge` and all else that takes a recipe go on from there, and the merged
folder's report and card say it too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

    from optmerge_core.evaluation.expert_merging import Learnt
    from optmerge_core.study.recipe import Recipe

OF_METHODS = ("method_options", "then", "trim")
"""Keys of a recipe that say something of other methods than what is written."""


def add_command(commands: Any, command: Callable[[Namespace], None]) -> None:
    """`learn` among the commands of an argument parser."""
    text = "learn on a few unlabelled questions how much of each expert merges (not data-free)"
    sub = commands.add_parser("learn", help=text, description=text)
    sub.set_defaults(command=command)
    sub.add_argument("recipe", metavar="RECIPE", help="YAML, see data/recipes")
    text = "pictures and questions of each expert's task (default: 5)"
    sub.add_argument("--samples", metavar="N", type=int, default=5, help=text)
    text = (
        "folder with EXPERT.parquet for each expert, columns image and question (default: "
        "validation in the folder of the recipe's evaluation.data, whose answers are not read)"
    )
    sub.add_argument("--data", metavar="DIR", help=text)
    text = "recipe to write, for `merge` and all other commands"
    sub.add_argument("--output", metavar="FILE", required=True, help=text)
    text = "of the learning, such as steps=60 learning_rate=0.05 unit=layer"
    sub.add_argument("--set", metavar="NAME=VALUE", nargs="+", default=[], help=text)
    sub.add_argument("--device", default="auto", help="auto (default), cpu or cuda")


def learn_recipe(recipe: Recipe, options: Namespace, evaluator_for: Callable[..., Any]) -> None:
    """Learn by a command's options and write the recipe; `evaluator_for` as in `benchmark`.

    Raises `ValueError`, before anything is loaded, for a file that is there already, settings that
    are none, and questions that are missing.
    """
    target = Path(options.output)
    if target.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--output {target}: a recipe is written; give a name that ends in .yaml")
    if target.exists():
        raise ValueError(f"{target} is there already: choose another name, or remove it")
    if recipe.merges == "modalities":
        raise ValueError(f"{recipe.name} merges modalities, which share no questions to learn on")
    from optmerge_core.evaluation.expert_merging import learn
    from optmerge_core.evaluation.questions import load_unlabelled
    from optmerge_core.study.open import open_study
    from optmerge_core.study.side_files import check_askable

    settings, data = _settings(options.set), options.data
    if data is None and recipe.evaluation.data is None:
        raise ValueError("--data: name a folder with EXPERT.parquet; the recipe has no questions")
    folder = Path(recipe.evaluation.data or "", "validation") if data is None else Path(data)
    questions = load_unlabelled(folder, list(recipe.experts), options.samples)
    check_askable(recipe)
    study = open_study(recipe)
    trust = {"trust_remote_code": recipe.trust_remote_code}
    evaluator = evaluator_for(
        recipe.base_model, questions, device=options.device, processor=study.processor, **trust
    )
    learnt = learn(study, evaluator, settings)
    write(target, recipe, learnt)
    print(
        f"{target}: {learnt.coefficients.size} coefficients from {options.samples} unlabelled "
        f"questions of each expert's task, loss {learnt.losses[0]:.3g} before and "
        f"{learnt.losses[-1]:.3g} after; not data-free, as report and card of its merge will say: "
        f"merge {target} --output DIR"
    )


def _settings(texts: Iterable[str]) -> Any:
    """`["steps=60"]` -> `Settings(steps=60)`. Raises `ValueError` for what is none."""
    from dataclasses import fields

    from optmerge_core.evaluation.expert_merging import Settings
    from optmerge_core.study.parsing import numeric, parse

    known, given = {x.name: type(x.default) for x in fields(Settings)}, {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known or not value:
            raise ValueError(f"--set {text!r}: write NAME=VALUE, with one of {', '.join(known)}")
        given[name] = numeric(parse(value))
        wanted = (int, float) if known[name] is float else known[name]
        if isinstance(given[name], bool) or not isinstance(given[name], wanted):
            raise ValueError(f"--set {text!r}: {name} is of another type ({known[name].__name__})")
    return Settings(**given)


def write(target: Path, recipe: Recipe, learnt: Learnt) -> None:
    """The recipe with the weights that were learnt, at `target`; `ValueError` if it is there."""
    import yaml  # which help needs not

    content = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"name", *OF_METHODS})
    experts = zip(recipe.experts.items(), learnt.weights(), strict=True)
    content |= {
        "merge_method": "task_arithmetic",
        "base_model": recipe.base_model,
        "models": [
            {"name": name, "model": place, "parameters": {"weight": weights}}
            for (name, place), weights in experts
        ],
        "parameters": {"lambda": 1.0},
        "learnt": learnt.facts(),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(_seen_from(target.parent, content), sort_keys=False, allow_unicode=True)
    with suppress(FileExistsError):
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
        return
    raise ValueError(f"{target} is there already: choose another name, or remove it")


def _seen_from(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The same with paths from the working directory as paths from a folder."""

    def seen(place: Any) -> Any:
        there = isinstance(place, str) and place != "base" and Path(place).exists()
        return os.path.relpath(place, folder) if there else place

    models = [entry | {"model": seen(entry["model"])} for entry in content["models"]]
    moved = {"base_model": seen(content["base_model"]), "models": models}
    names = [entry["name"] for entry in models]
    if "processor" in content and content["processor"] not in names:
        moved["processor"] = seen(content["processor"])
    if own := content.get("evaluation"):
        places = {key: seen(own[key]) for key in ("data", "contrast") if key in own}
        others = {name: seen(place) for name, place in own.get("references", {}).items()}
        moved["evaluation"] = own | places | ({"references": others} if others else {})
    return content | moved
