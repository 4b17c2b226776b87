"""What is trained of the embedded studies, with which settings: the base, experts, mixtures."""

import shutil
import time
from itertools import pairwise
from pathlib import Path

from optmerge_core.benchmark.models.smol import BUILD, base_folder, build_base
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.benchmark.training import experts, smol
from optmerge_core.benchmark.training.loop import save, spent, write_log

BASES = {  # Qwen2-VL starts from the other family's language model
    "internvl": {"learning_rate": 2e-3, "steps": 6000, "seed": 0},
    "qwen2_vl": {"learning_rate": 2e-3, "steps": 2500, "seed": 100, "start": "../internvl/base"},
}
SMOL = {  # what comes before its experts, each from the one before; SmolLM2 itself is not trained
    "tower": {"learning_rate": 2e-3, "steps": 6000, "batch": 24, "seed": 0},
    "stage": {"learning_rate": 6e-4, "steps": 240, "batch": 16, "seed": 0, "rank": 16},
    "stage2": {"learning_rate": 6e-4, "steps": 960, "batch": 16, "seed": 1, "rank": 16},
    "tower2": {"learning_rate": 1e-3, "steps": 1500, "batch": 24, "seed": 5, "boxes": True},
    "base": {
        "learning_rate": 6e-4, "steps": 960, "batch": 16, "seed": 2, "rank": 16, "boxes": True,
        "tasks": {"VQA": 1.0, "Geometry": 1.0, "Chart": 1.5, "OCR": 1.5, "Grounding": 2.0},
        "kept": 0.93,
    },
}  # fmt: skip
REGIMES = {  # gentle and strong fine-tuning: two points of Theorem 3.1's trade-off
    "internvl": {
        "gentle": {"learning_rate": 5e-4, "steps": 300},
        "stressed": {"learning_rate": 2e-3, "steps": 150},
    },
    "qwen2_vl": {"lora": {"learning_rate": 1e-3, "steps": 200, "rank": 8}},
    "smol": {
        "lora": {"learning_rate": 5e-4, "steps": 60, "rank": 8, "batch": 16},
        "long": {"learning_rate": 2e-3, "steps": 150, "rank": 8, "batch": 16},
    },
}
MIXTURE = {"smol": {"learning_rate": 2e-3}}  # where another rate was better on validation
SEEDS = (1, 11, 21)  # of experts; the first's are shipped, and the scores of all
SNAPSHOTS = (10, 20, 40, 80, 160)  # steps after which the experts of App. B.1 are kept
VARIOUS = {  # Table 6: experts by different makers; the last snapshot of Geometry is the fourth
    "various/OCR": {"tasks": ["OCR"], "learning_rate": 3e-3, "steps": 100, "rank": 4},
    "various/Chart": {"tasks": ["Chart"], "learning_rate": 5e-4, "steps": 100},
    "various/Scenes": {"tasks": ["VQA", "Grounding"], "learning_rate": 1e-3, "steps": 150,
                       "rank": 8},
}  # fmt: skip


def plan(family="internvl", seed=SEEDS[0]):
    """Folder -> settings of `fine_tune`: per regime an expert a task and a mixture-training model.

    The mixture model sees as many samples as its regime's experts together; smol's `long` has none.
    """
    jobs = {}
    for regime, settings in REGIMES[family].items():
        for number, task in enumerate(TASKS):
            jobs[f"{regime}/{task}"] = settings | {"tasks": [task], "seed": seed + number}
        if (family, regime) == ("smol", "long"):
            continue
        steps = settings["steps"] * len(TASKS)
        mixture = {"tasks": list(TASKS), "seed": seed + len(TASKS), "steps": steps}
        jobs[f"{regime}/mixture"] = settings | mixture | MIXTURE.get(family, {})
    if family == "qwen2_vl":
        for number, (name, job) in enumerate(VARIOUS.items()):
            jobs[name] = job | {"seed": seed + 50 + number}
        for number, task in enumerate(TASKS):
            jobs[f"steps/{SNAPSHOTS[-1]:04d}/{task}"] = {
                "tasks": [task], "seed": seed + 60 + number, "learning_rate": 3e-3, "rank": 8,
                "steps": SNAPSHOTS[-1], "decay": False,
                "snapshots": {n: f"steps/{n:04d}/{task}" for n in SNAPSHOTS[:-1]},
            }  # fmt: skip
    return jobs


def build(output, family="internvl", only=None, seed=SEEDS[0], width=1, learning_rate=None):
    """Train what is shipped of a family into `output`: the base, then `plan`'s models (or `only`).

    learning_rate: another than the plan's. What is there is kept; of smol, what was interrupted
    goes on from <name>.state.pt. Beside each folder lies a log of its settings, loss and seconds.
    On two cores about three quarters of an hour for a small family's base, a minute or two for an
    expert; at twice the width (four times the parameters) three times that. Of smol: tower 80
    minutes, stage half an hour, base two hours, five minutes for an expert. Raises `ValueError` for
    another width of smol.
    """
    if family == "smol" and width != 1:
        raise ValueError("smol: SmolLM2's width is what it is; leave --width out")
    output = Path(output)
    first = SMOL if family == "smol" else {"base": BASES[family] | {"width": width}}
    jobs, names = first | plan(family, seed), [*first, *plan(family, seed)]
    if family == "smol":  # what comes before a stage that is there is not needed again
        names = names[max(n for n, x in enumerate(SMOL) if not n or (output / x).exists()) :]
        if (output / "base.json").exists():
            base_folder(output)  # of what was trained before
            names = [name for name in names if name not in SMOL]
            if only in SMOL:
                return output
    for name in [only] if only else names:
        if name not in jobs:
            raise ValueError(f"{family} has no model {name!r}; it has {', '.join(jobs)}")
        if (output / name).exists():
            continue
        state, settings = output / f"{name}.state.pt", jobs[name]
        started = time.perf_counter() - spent(state)
        if learning_rate is not None:
            settings = settings | {"learning_rate": learning_rate}
        if family == "smol":
            losses, told = _train_smol(output, name, settings | {"state": state})
        else:
            losses, told = _train_small(output, name, settings, family)
        write_log(output / name, told | settings, losses, started)
        state.unlink(missing_ok=True)
    return output


def _train_small(output, name, settings, family):
    """One model of a small family; returns its losses and what else its log says."""
    if name == "base":
        start = output / settings["start"] if "start" in settings else None
        if start and not start.exists():
            build(start.parent, start.parent.resolve().name, only="base", width=settings["width"])
        model, processor, losses = experts.train_base(family, **settings | {"start": start})
    else:
        snapshots = {n: output / path for n, path in settings.get("snapshots", {}).items()}
        model, processor, losses = experts.fine_tune(
            output / "base", label=name, **settings | {"snapshots": snapshots}
        )
    save(model, processor, output / name, output / "base")
    return losses, {"tasks": list(TASKS)}


def _train_smol(output, name, settings):
    """The same of the study smol, whose base is built of what was trained."""
    settings["state"].parent.mkdir(parents=True, exist_ok=True)
    earlier = {later: output / one for one, later in pairwise(SMOL)}
    before = earlier.get(name)  # of the first, the tower, there is none
    if name.startswith("tower"):
        model, losses = smol.train_tower(before, **settings)
        smol.save_sight(model, output / name / "sight.safetensors")
        if before:  # what it does not change it hands on
            for path in before.glob("adapter*"):
                shutil.copy(path, output / name)
        return losses, {}
    if name.startswith("stage"):
        model, losses = smol.train_base(before, **settings)
        save(model, None, output / name, output / "base")
        smol.save_sight(model.get_base_model(), output / name / "sight.safetensors")
        return losses, {}
    if name == "base":
        adapter, sight = output / "base_adapter", output / "sight.safetensors"
        model, losses = smol.train_base(before, **settings)
        save(model, None, adapter, output / name)
        smol.save_sight(model.get_base_model(), sight)
        return losses, {"sha256": build_base(output / name, adapter, sight), "build": BUILD}
    model, processor, losses = smol.fine_tune(output / "base", label=name, **settings)
    save(model, processor, output / name, output / "base")
    return losses, {}
