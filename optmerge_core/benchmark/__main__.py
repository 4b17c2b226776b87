"""python -m optmerge_core.benchmark questions | train | omni-train | seeds | …

What made the shipped checkpoints and the tables of longer experiments; each takes minutes to hours.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from optmerge_core.errors import exit_status

COMMANDS = {
    "questions": "tasks.samples:write_splits",
    "questions smol": "tasks.english.datasets:write_splits",
    "questions smol_omni": "tasks.spoken_questions:write_splits",
    "train": "training.build:build",
    "omni-train": "training.omni:build",
    "smol-omni-train": "training.spoken_build:build",
    "smol-omni-base": "models.spoken:folders",
    "smol-base": "models.smol:base_folder",
    "seeds": "experiments.seeds:main",
    "omni-seeds": "experiments.omni_seeds:main",
    "smol-omni-seeds": "experiments.spoken_seeds:main",
    "subsets": "experiments.subsets:main",
    "ranks": "experiments.ranks:main",
    "null-directions": "experiments.null_directions:main",
    "learning-rates": "experiments.learning_rates:main",
    "rate-map": "experiments.rate_map:main",
    "comparison": "experiments.comparison:main",
    "expert-merging": "experiments.expert_merging:main",
    "play": "experiments.play:main",
    "smol-texts": "experiments.knowledge:main",
}
"""Command, and the study if one is named -> file and function, imported when they are asked for."""
FAMILIES, MODALITIES = ("internvl", "qwen2_vl", "smol"), ("vision", "audio", "video")
REGIMES = ("gentle", "stressed", "lora", "long")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, see `errors.exit_status`."""
    options = vars(parser().parse_args(arguments))
    command = " ".join(filter(None, (options.pop("command"), options.pop("study", None))))
    given = {name: value for name, value in options.items() if value is not None}
    return exit_status(lambda: _run(command, given))


def _run(command: str, given: dict[str, Any]) -> None:
    """The recipes, if there are any, are looked at before the command's file is imported."""
    from optmerge_core.study.recipe import read_recipe

    for path in [*given.get("recipes", []), *([given["recipe"]] if "recipe" in given else [])]:
        read_recipe(path)
    file, function = COMMANDS[command].split(":")
    getattr(import_module(f"optmerge_core.benchmark.{file}"), function)(**given)


def parser() -> argparse.ArgumentParser:
    """An option that is not given is the function's own default."""
    whole = argparse.ArgumentParser("python -m optmerge_core.benchmark", description=__doc__)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, *names: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        for positional in names:
            sub.add_argument(positional, metavar=positional.upper())
        return sub

    sub = add("questions", "draw the questions that ship, into FOLDER", "folder")
    sub.add_argument(
        "--study", choices=("smol", "smol_omni"), help="default: the embedded families'"
    )
    sub = add("train", "train a family's base, experts and mixture models into OUTPUT", "output")
    sub.add_argument("--family", choices=FAMILIES, help="default: internvl")
    sub.add_argument("--only", help="base, or the folder of one model, as gentle/VQA")
    sub.add_argument("--seed", type=int, help="of the experts (default: as shipped)")
    sub.add_argument("--width", type=int, help="2: four times the parameters")
    sub.add_argument("--learning-rate", type=float, help="default: the plan's")
    sub = add("omni-train", "train the Omni benchmark's models into OUTPUT", "output")
    sub.add_argument("--seeds", nargs="+", type=int)
    sub.add_argument("--modalities", nargs="+", choices=MODALITIES, help="default: all")
    _studies_on_smollm2(add)
    for name, text in {
        "seeds": "train, merge and evaluate RECIPE's experts for other seeds: OUTPUT/seeds.csv",
        "omni-seeds": "merge and evaluate RECIPE's specialists of all seeds: OUTPUT/seeds.csv",
        "smol-omni-seeds": "ask RECIPE's merged specialists of all seeds aloud: OUTPUT/spoken.csv",
    }.items():
        sub = add(name, text, "recipe", "output")
        sub.add_argument("--seeds", nargs="+", type=int)
        if name == "seeds":
            text = "train the models of mixture training anew as well"
            sub.add_argument("--references", action="store_true", default=None, help=text)
            sub.add_argument("--regime", choices=REGIMES, help="of the experts, if not RECIPE's")
    sub = add("subsets", "merge every pair and triple of experts: OUTPUT/subsets.csv")
    sub.add_argument("recipes", metavar="RECIPE", nargs="+")
    sub.add_argument("--output", required=True)
    sub = add("play", "what the notebooks' sliders show: OUTPUT/play_scores.csv, play_spectra.csv")
    sub.add_argument("recipes", metavar="RECIPE", nargs="+")
    sub.add_argument("--output", required=True)
    add("ranks", "RECIPE's study with other ranks, and none: OUTPUT/ranks.csv", "recipe", "output")
    text = "TSV and Iso-C where experts have no direction: OUTPUT/null_directions.csv"
    sub = add("null-directions", text, "recipe", "output")
    sub.add_argument("--count", type=int, help="validation questions a task")
    text = "merge RECIPE's experts at many learning rates of merging: OUTPUT/rate_map.csv"
    sub = add("rate-map", text, "recipe", "output")
    sub.add_argument("--seeds", nargs="+", type=int)
    text = "merge and evaluate RECIPE's experts by all methods alike: OUTPUT/comparison.csv"
    sub = add("comparison", text, "recipe", "output")
    sub.add_argument("--seeds", nargs="+", type=int)
    sub.add_argument("--methods", nargs="+", help="some of them (default: all)")
    text = "RECIPE's experts at several learning rates: OUTPUT/learning_rates.csv"
    add("learning-rates", text, "recipe", "output").add_argument("--rates", nargs="+", type=float)
    text = "learn coefficients on unlabelled questions, beside λ on as many labelled: OUTPUT/*.csv"
    sub = add("expert-merging", text, "recipe", "output")
    for name in ("samples", "draws", "seeds"):
        sub.add_argument(f"--{name}", nargs="+", type=int)
    return whole


def _studies_on_smollm2(add: Callable[..., argparse.ArgumentParser]) -> None:
    """What trains and builds the models of `smol` and `smol_omni`."""
    sub = add("smol-omni-train", "train what the study smol_omni composes into OUTPUT", "output")
    sub.add_argument("--only", help="language_model, ear, clips, specialists, or as seed1/vision")
    sub.add_argument("--seeds", nargs="+", type=int, help="of the specialists")
    sub.add_argument("--sight", help="tower and projector of the study smol, if not as shipped")
    sub = add("smol-omni-base", "build the models of the study smol_omni, which do not ship")
    sub.add_argument("--place", help="of what they are built from (default: data/…/smol_omni)")
    sub.add_argument("--sight", help="tower and projector of the study smol, if not beside it")
    add("smol-texts", "let SmolLM2 say what its study asks and trains with, into FOLDER", "folder")
    sub = add("smol-base", "build the base model of the study smol, which does not ship")
    sub.add_argument("--place", help="of what it is built from (default: data/benchmark/smol)")


if __name__ == "__main__":
    sys.exit(main())
