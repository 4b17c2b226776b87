"""Is it the rank? The LoRA study again with adapters of other ranks, and without adapters.

`python -m optmerge_core.benchmark ranks RECIPE OUT` fine-tunes the recipe's base on every task, for
each rank and once with all weights of the same layers (ten minutes each on two cores), merges and
evaluates as `seeds` does, and writes OUT/ranks.csv: a row per rank and model, test accuracy a task.
"""

from pathlib import Path

from tqdm.auto import tqdm

from optmerge_core.benchmark.experiments.seeds import (
    evaluate,
    evaluators,
    scores,
    with_experts,
    write,
)
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.benchmark.training.build import REGIMES, SEEDS
from optmerge_core.benchmark.training.experts import fine_tune
from optmerge_core.benchmark.training.loop import save
from optmerge_core.study.recipe import load_recipe

RANKS = {f"rank {rank}": REGIMES["qwen2_vl"]["lora"] | {"rank": rank} for rank in (4,)}
SETTINGS = RANKS | {"full": REGIMES["internvl"]["gentle"]}


def expert_folders(study, folder, settings):
    """Task -> folder of an expert fine-tuned into `folder`; what is there is kept."""
    folders = {}
    for number, task in enumerate(TASKS):
        folders[task] = str(target := Path(folder, task))
        if not target.exists():
            model, processor, _ = fine_tune(
                study.base_model, [task], seed=SEEDS[0] + number, label=task, **settings
            )
            save(model, processor, target, study.base_model)
    return folders


def main(recipe, output):
    study, tables = load_recipe(recipe), {}
    validation, test = evaluators(study)
    for name, settings in tqdm(SETTINGS.items(), desc="ranks"):
        experts = expert_folders(study, Path(output, name.replace(" ", "")), settings)
        answers, _ = evaluate(with_experts(study, experts), validation, test)
        tables[name] = scores(answers)
    write(tables, "rank", Path(output, "ranks.csv"))
