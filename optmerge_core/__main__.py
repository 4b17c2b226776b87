"""optmerge, or python -m optmerge_core: merge | plan | inspect | run RECIPE, and what follows them.

Each command imports what it needs once its recipe is read, so that help and refusals are quick.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optmerge_core.errors import exit_status, extra
from optmerge_core.study import in_parts, learning
from optmerge_core.study.shares import ALL_GPUS

if TYPE_CHECKING:
    from optmerge_core.study.push import Push
    from optmerge_core.study.recipe import Recipe


CLUSTER = "on many machines, by Ray: an address, auto, or local for processes on this one"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, see `errors.exit_status`."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: options.command(options))


def _load_recipe(path: str, stream: bool) -> Recipe:
    from optmerge_core.study.recipe import load_recipe

    recipe = load_recipe(path)
    from optmerge_core.study.open import check_stream

    check_stream(recipe, stream)
    left_out = [e.name for e in recipe.models if e.name not in recipe.experts]
    if left_out:
        names = ", ".join(left_out)
        warnings.warn(
            f"models: {names} is the base model itself; left out, as mergekit does", stacklevel=1
        )
    return recipe


def _settings(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """What `merge` takes: the recipe's, but for what the command line has."""
    from optmerge_core.study.open import settings

    chosen = settings(recipe, options.method)
    chosen |= {"device": options.device, "overwrite": options.overwrite}
    for name in ("router", "processor", "scaling_coefficient"):
        if getattr(options, name) is not None:
            chosen[name] = getattr(options, name)
    return chosen


def merge_command(options: argparse.Namespace) -> None:
    recipe = _load_recipe(options.recipe, options.stream)
    from optmerge_core.merging.merge import merge
    from optmerge_core.study.findings import ADAPTER, OTHER_BASE_NORM
    from optmerge_core.study.push import push_of

    models = (recipe.base_model, recipe.experts, options.output)
    push = push_of(options, recipe)
    chosen = _settings(recipe, options)
    if recipe.merges == "modalities":
        if options.processor is not None:
            raise ValueError("--processor: every specialist keeps its own; leave it out")
        if options.cluster is not None:
            raise ValueError("--cluster: specialists are merged in one process; leave it out")
        from optmerge_core.omni import compose

        compose(*models, **chosen)
        print(f"{options.output}: one Omni model of {', '.join(recipe.experts)}")
        _finish(options, recipe, push)
        return
    if options.cluster is None and options.device != ALL_GPUS:
        report = merge(*models, **chosen, stream=options.stream)
    else:
        report = in_parts.merge_by_many(recipe, options, chosen)
    for name, norm in report.relative_norms().items():
        if norm > OTHER_BASE_NORM:
            reason = "its alpha, rank or learning rate may not be what was meant"
            if not any(file.startswith(ADAPTER) for file in report.experts[name]["sha256"]):
                reason = "it was probably made from another base"
            warnings.warn(
                f"expert {name} differs from the base by {norm:.0%} of its norm, more than "
                f"fine-tuning does: {reason}; `inspect` says more",
                stacklevel=1,
            )
    print(
        f"{options.output}: {len(report.parameters)} parameters of {len(report.experts)} experts "
        f"merged by {report.method}, {report.parameters_kept} kept from the base, "
        f"{report.seconds:.1f} s, at most {report.peak_memory_bytes / 1e9:.2f} GB of memory"
    )
    _finish(options, recipe, push)


def _finish(options: argparse.Namespace, recipe: Recipe, push: Push | None) -> None:
    _check(options, recipe)
    if push is not None:
        print(f"pushed: {push.send(options.output)}")


def _check(options: argparse.Namespace, recipe: Recipe) -> None:
    """See whether the merged folder works, unless told not to; with --check failing is an error."""
    if options.check is False:
        return
    from optmerge_core.evaluation.check import check_merged
    from optmerge_core.merging.templates import processor_class

    model_class = None
    with suppress(ImportError), extra("models"):  # which the check itself tells
        import transformers

        if recipe.merges == "modalities":
            from optmerge_core.omni import OmniForConditionalGeneration as model_class
        elif not hasattr(transformers, processor_class(Path(options.output)) or "AutoProcessor"):
            import_module("optmerge_core.benchmark.models.registry")  # it may be one of its own
    trust = {"trust_remote_code": recipe.trust_remote_code, "model_class": model_class}
    trust |= {"device": options.device.removesuffix(":all")}
    check = check_merged(options.output, **trust)
    if options.check and (check.failed or not check.model_class):
        raise ValueError(f"{options.output}: {' '.join(check.sentences())}")
    for sentence in check.sentences():
        if sentence.startswith("Failed"):
            warnings.warn(f"{options.output}: {sentence}", stacklevel=1)
        else:
            print(sentence)


def plan_command(options: argparse.Namespace) -> None:
    recipe = _load_recipe(options.recipe, options.stream)
    in_parts.tell(in_parts.plan_recipe(recipe, options, _settings(recipe, options)))


def inspect_command(options: argparse.Namespace) -> None:
    recipe = _load_recipe(options.recipe, options.stream)
    from rich.console import Console

    from optmerge_core.study.inspect import show
    from optmerge_core.study.open import open_study

    width = None if sys.stdout.isatty() else 120
    show(open_study(recipe, stream=options.stream), Console(highlight=False, width=width))


def run_command(options: argparse.Namespace) -> None:
    in_parts.check_one_device(options.device)
    if options.sweep is None:
        from optmerge_core.study.notebooks import run

        if options.cluster is not None:
            from optmerge_core.study.cluster import run_on_cluster

            run_on_cluster(options.recipe, options.output, options.device, options.cluster)
        run(options.recipe, options.output, options.device)
        return
    if options.output is None:
        raise ValueError("--sweep: give --output DIR, the folder of its table")
    from optmerge_core.study.recipe import load_recipe

    recipes = [load_recipe(path) for path in options.recipe]
    from optmerge_core.study.side_files import check_askable
    from optmerge_core.study.sweep import parse_axes, show, sweep

    axes = parse_axes(options.sweep)
    for recipe in recipes:
        if recipe.evaluation.data is not None and recipe.merges == "capabilities":
            check_askable(recipe)
    if options.cluster is not None:
        from optmerge_core.study.cluster import sweep_on_cluster

        share = f"{__package__}.__main__:{sweep_share.__name__}"
        given = (options.recipe, axes, options.output, options.device, options.cluster)
        sweep_on_cluster(share, *given)
    score_of = partial(_validation_score, options.device)
    show(sweep(options.recipe, axes, options.output, options.device, score_of), options.output)


def sweep_share(recipe: str, axes: dict[str, list[Any]], output: str, device: str) -> None:
    """The part of a sweep that is one task of a cluster."""
    from optmerge_core.study.sweep import sweep

    sweep([recipe], axes, output, device, partial(_validation_score, device))


def _validation_score(device: str, recipe: Recipe):
    """How a sweep scores a recipe's merged models; None where it names no questions."""
    size = recipe.evaluation
    if size.data is None:
        return None
    # the package itself needs no benchmark
    from optmerge_core.benchmark.evaluator import evaluator_for
    from optmerge_core.evaluation.metrics import accuracy
    from optmerge_core.evaluation.questions import load_split
    from optmerge_core.study.open import open_study

    data = load_split(size.data, "validation", size.validation_samples)
    trust = recipe.trust_remote_code
    options = {"device": device, "processor": open_study(recipe).processor}
    evaluator = evaluator_for(recipe.base_model, data, trust_remote_code=trust, **options)
    return lambda *merged: accuracy(evaluator.answer_merged(*merged)).to_dict()


def extract_command(options: argparse.Namespace) -> None:
    from optmerge_core.study.extract import extract_adapter, summary

    given = {"rank": options.rank, "family": options.family, "overwrite": options.overwrite}
    print(summary(extract_adapter(options.base_model, options.expert, options.output, **given)))


def learn_command(options: argparse.Namespace) -> None:
    recipe = _load_recipe(options.recipe, stream=False)
    from optmerge_core.benchmark.evaluator import evaluator_for

    learning.learn_recipe(recipe, options, evaluator_for)


def benchmarks_command(options: argparse.Namespace) -> None:
    if (options.model is None) == (options.results is None):
        raise ValueError("give either a merged model's folder, or --results with result files")
    from optmerge_core.study import benchmarks

    if options.model is not None:
        benchmarks.hand_off(options.model, options.table, options.output)
    else:
        benchmarks.beside_paper(options.results, options.table, options.row, options.output)


def _parser() -> argparse.ArgumentParser:
    script = Path(sys.argv[0]).stem == "optmerge"
    prog = "optmerge" if script else "python -m optmerge_core"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition("\n")[0])
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
                required=command in (merge_command, plan_command),
                help="folder to write (run: default figures/<name> and runs/<name>)",
            )
            more = "; cuda:all, all GPUs of this machine" if command is merge_command else ""
            text = f"auto (default), cpu or cuda{more}"
            sub.add_argument("--device", default="auto", help=text)
        return sub

    sub = add("merge", merge_command, "merge a recipe's experts into one model folder")
    _add_merge_options(sub)
    _add_push_options(sub)
    stream = "read weights from the hub or a web server tensor by tensor, without downloading them"
    sub.add_argument("--stream", action="store_true", help=stream)
    sub.set_defaults(plan=None, max_part_size=None)
    sub.add_argument("--cluster", metavar="ADDRESS", help=CLUSTER)
    text = "decide a merge and cut it into parts, for `part` and `join` on any machine"
    sub = add("plan", plan_command, text)
    sub.add_argument("--stream", action="store_true", help=stream)
    _add_merge_options(sub, check=False)
    in_parts.add_options(sub, commands)
    text = "measure a recipe's experts and say whether they will merge"
    sub = add("inspect", inspect_command, text, output=False)
    sub.add_argument("--stream", action="store_true", help=stream)
    text = "run the notebooks on a recipe, or on several and compare; or sweep over settings"
    sub = add("run", run_command, text)
    sub.add_argument("--cluster", metavar="ADDRESS", help=CLUSTER)
    sub.add_argument(
        "--sweep",
        metavar="NAME=VALUE,VALUE",
        nargs="*",
        help="no notebooks, but one table of all combinations: method=ties,optmerge "
        "lambda=0.3,0.7,1 rank_ratio=0.1,0.2",
    )
    text = "a full fine-tuning's update as a LoRA adapter, and how much of it that keeps"
    sub = commands.add_parser("extract", help=text, description=text)
    sub.set_defaults(command=extract_command)
    for name in ("base_model", "expert"):
        sub.add_argument(name, metavar=name.upper(), help="folder or hub id")
    sub.add_argument("--rank", type=int, required=True, metavar="R")
    sub.add_argument("--output", metavar="DIR", required=True, help="folder to write")
    sub.add_argument("--family", help="which parameters merge, if config.json's type does not say")
    sub.add_argument("--overwrite", action="store_true", help="replace an adapter at DIR")
    learning.add_command(commands, learn_command)
    _add_benchmarks(commands)
    return parser


def _add_benchmarks(commands) -> None:
    text = "how to run public benchmarks on a merged model, or their results beside the paper's"
    sub = commands.add_parser("benchmarks", help=text, description=text)
    sub.set_defaults(command=benchmarks_command)
    sub.add_argument("model", metavar="MODEL", nargs="?", help="folder of a merged model")
    sub.add_argument(
        "--results", metavar="PATH", nargs="+", help="files of lmms-eval and VLMEvalKit, or folders"
    )
    sub.add_argument("--table", default="2", help="of the paper: 2 (default), 3, 6, 9 or 10")
    sub.add_argument("--row", default="OptMerge", help="of that table (default: OptMerge)")
    sub.add_argument("--output", metavar="DIR", help="folder to write scripts or the table to")


def _add_merge_options(sub: argparse.ArgumentParser, check: bool = True) -> None:
    """What `merge` takes beside recipe, output and device, and `plan` without the check."""
    sub.add_argument("--method", help="another method than the recipe's")
    sub.add_argument("--scaling-coefficient", type=float, metavar="X", help="not the recipe's")
    text = "a mixture's router: by the same method, or the base's (default: the recipe's)"
    sub.add_argument("--router", choices=["merge", "base"], help=text)
    text = "whose processor, tokenizer and chat template: base, an expert's name or a folder"
    sub.add_argument("--processor", metavar="NAME", help=f"{text} (default: the recipe's)")
    text = (
        "see whether the merged folder opens, is prompted, computes and answers (default: where "
        "its class and free memory allow; with --check what fails is an error)"
    )
    if check:
        action = argparse.BooleanOptionalAction
        sub.add_argument("--check", action=action, default=None, help=text)
    sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DIR")


def _add_push_options(sub: argparse.ArgumentParser) -> None:
    text = "then upload the folder to the hub, into a private repository unless --public is said"
    sub.add_argument("--push", metavar="OWNER/NAME", help=text)
    sub.add_argument("--public", action="store_true", help="for all to see")
    text = "in the place of what the repository has"
    sub.add_argument("--replace", action="store_true", help=text)
    text = "of the pushed card (default: that of base and experts, or other where they differ)"
    sub.add_argument("--license", metavar="ID", help=text)
    text = "push although a model's licence forbids derivatives"
    sub.add_argument("--despite-license", action="store_true", help=text)


if __name__ == "__main__":
    sys.exit(main())
