"""python -m optmerge_core merge | inspect | run RECIPE."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from optmerge_core.adapters import open_expert
from optmerge_core.checkpoints import open_checkpoint
from optmerge_core.checks import check_experts
from optmerge_core.merge import merge
from optmerge_core.parameters import mergeable
from optmerge_core.pipeline import NotebookError, run
from optmerge_core.recipe import load_recipe
from optmerge_core.task_vectors import TaskVectors, layer_norms


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 1 for an error that is explained on stderr."""
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_: print(f"notice: {message}", file=sys.stderr)
        try:
            options.command(options)
        except (ValueError, OSError, NotebookError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def merge_command(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe)
    method = options.method or recipe.merge_method
    scaling_coefficient = options.scaling_coefficient
    report = merge(
        recipe.base_model,
        recipe.experts,
        options.output,
        method=method,
        method_options=recipe.options(method),
        scaling_coefficient=(
            recipe.scaling_coefficient if scaling_coefficient is None else scaling_coefficient
        ),
        device=options.device,
        dtype=recipe.dtype,
        trim=recipe.trim,
        seed=recipe.seed,
        family=recipe.family,
        overwrite=options.overwrite,
    )
    print(
        f"{options.output}: {len(report.parameters)} parameters of {len(report.experts)} experts "
        f"merged by {method}, {report.parameters_kept} kept from the base, "
        f"{report.seconds:.1f} s, at most {report.peak_memory_bytes / 1e9:.2f} GB of memory"
    )


def inspect_command(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe)
    base = open_checkpoint(recipe.base_model)
    experts = {name: open_expert(location, base) for name, location in recipe.experts.items()}
    model_type = recipe.family or base.config().get("model_type")
    names = mergeable(base.shapes(), model_type)
    check_experts(base, experts, names, model_type)
    task_vectors = TaskVectors(base, experts, tqdm(names, desc="reading", unit="parameter"))
    norms = layer_norms(task_vectors)

    console = Console()
    console.print(
        f"{recipe.name}: {model_type}, {len(names)} parameters merge, {len(base) - len(names)} "
        "are the base's",
        highlight=False,
    )
    table = Table("expert", title="task vector norm relative to the base model's")
    for column in ("all layers", "least layer", "greatest layer"):
        table.add_column(column, justify="right")
    for name, rows in norms.groupby("expert", sort=False):
        squares = rows[["norm", "base_norm"]].pow(2)
        by_layer = squares.groupby(rows["layer"]).sum().pow(0.5)
        layers = by_layer["norm"] / by_layer["base_norm"]
        total = squares.sum().pow(0.5)
        values = [total["norm"] / total["base_norm"], layers.min(), layers.max()]
        table.add_row(name, *(f"{value:.2%}" for value in values))
    console.print(table)


def run_command(options: argparse.Namespace) -> None:
    run(options.recipe, options.output, options.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m optmerge_core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command, text: str, output: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        several = "+" if command is run_command else None
        sub.add_argument("recipe", metavar="RECIPE", nargs=several, help="YAML, see data/recipes")
        if output:
            sub.add_argument(
                "--output",
                metavar="DIR",
                required=command is merge_command,
                help="folder to write (run: default figures/<name> and runs/<name>)",
            )
            sub.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
        return sub

    sub = add("merge", merge_command, "merge a recipe's experts into one model folder")
    sub.add_argument("--method", help="another method than the recipe's")
    sub.add_argument("--scaling-coefficient", type=float, metavar="X", help="not the recipe's")
    sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DIR")
    add("inspect", inspect_command, "show what a recipe's merge would merge", output=False)
    add("run", run_command, "run the notebooks on a recipe, or on several and compare")
    return parser


if __name__ == "__main__":
    sys.exit(main())
