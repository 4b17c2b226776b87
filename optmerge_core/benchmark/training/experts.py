"""Training of the embedded benchmark: a mediocre base, five experts, mixture-training models.

Everything is drawn on the fly from fixed seeds. Experts and mixture models train the language
model's linear layers only, so all that they learnt is in what merging merges.
"""

import copy
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from optmerge_core.benchmark.models.registry import build_model, build_processor
from optmerge_core.benchmark.tasks.samples import TASKS, sample
from optmerge_core.merging.families import mergeable

BASES = {  # Qwen2-VL starts from the other family's language model
    "internvl": {"learning_rate": 2e-3, "steps": 6000, "seed": 0},
    "qwen2_vl": {"learning_rate": 2e-3, "steps": 2500, "seed": 100, "start": "../internvl/base"},
}
BASE = {  # all there is to see, but some kinds of question only about few things
    "tasks": {"VQA": 0.22, "Geometry": 0.28, "Chart": 0.22, "OCR": 0.08, "Grounding": 0.2},
    "levels": {"grid": 0.2, "caption": 0.15, "easy": 0.3, "medium": 0.35},
}
REGIMES = {  # gentle and strong fine-tuning: two points of Theorem 3.1's trade-off
    "internvl": {
        "gentle": {"learning_rate": 5e-4, "steps": 300},
        "stressed": {"learning_rate": 2e-3, "steps": 150},
    },
    "qwen2_vl": {"lora": {"learning_rate": 1e-3, "steps": 200, "rank": 8}},
}
SEEDS = (1, 11, 21)  # of experts; the first's are shipped, and the scores of all
SNAPSHOTS = (10, 20, 40, 80, 160)  # steps after which the experts of App. B.1 are kept
VARIOUS = {  # Table 6: experts by different makers; the last snapshot of Geometry is the fourth
    "various/OCR": {"tasks": ["OCR"], "learning_rate": 3e-3, "steps": 100, "rank": 4},
    "various/Chart": {"tasks": ["Chart"], "learning_rate": 5e-4, "steps": 100},
    "various/Scenes": {"tasks": ["VQA", "Grounding"], "learning_rate": 1e-3, "steps": 150,
                       "rank": 8},
}  # fmt: skip


class Samples(Dataset):
    """Training sample i of a mixture of tasks and levels, drawn when asked for.

    A batch has one level: captions are long, answers short, and padding would cost a third.
    """

    def __init__(self, count, batch, tasks, levels, seed):
        self.count, self.batch, self.seed = count, batch, seed
        self.tasks, self.task_weights = list(tasks), np.array(list(tasks.values()))
        self.levels, self.level_weights = list(levels), np.array(list(levels.values()))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, 9, index])
        task = self.tasks[
            rng.choice(len(self.tasks), p=self.task_weights / self.task_weights.sum())
        ]
        rng = np.random.default_rng([self.seed, 8, index // self.batch])
        level = self.levels[
            rng.choice(len(self.levels), p=self.level_weights / self.level_weights.sum())
        ]
        return sample(task, "train", index, level, self.seed)


@dataclass(frozen=True)
class Collate:
    """Samples to one batch: input_ids and labels (b, t), padded right, and the family's images."""

    processor: object

    def __call__(self, samples):
        tokenizer = self.processor.tokenizer
        rows = [self.processor.conversation(s.turns) for s in samples]
        ids = iter(tokenizer([part for row in rows for part in row])["input_ids"])
        rows = [[next(ids) for _ in row] for row in rows]
        width = max(sum(map(len, row)) for row in rows)
        input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), -100)
        for row, tokens, targets in zip(rows, input_ids, labels, strict=True):
            start = 0
            for number, part in enumerate(row):  # question, answer, question, answer, ...
                end = start + len(part)
                tokens[start:end] = torch.tensor(part)
                if number % 2:
                    targets[start:end] = tokens[start:end]
                start = end
        images = self.processor.image_inputs(np.stack([s.image for s in samples]), input_ids)
        return {"input_ids": input_ids, "labels": labels, **images}


def train(
    model, batches, *, learning_rate, steps, parameters=None, warmup=0.05, decay=True, label="",
    after_step=None,
):  # fmt: skip
    """AdamW with linear warm-up and cosine decay over `batches`; returns the loss of every step.

    parameters: names of the parameters to train (None: all); without `decay` the learning rate
    stays; after_step: called with the number of steps done. Products in bfloat16, weights in
    float32; attention is written out because its fused bfloat16 backward is the slowest step on a
    CPU. No attention mask is needed: padding stands to the right of a causal model.
    """
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameters is None or name in parameters)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, learning_rate, weight_decay=0.01 if parameters is None else 0.0
    )

    def schedule(step):
        rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
        return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps)) if decay else rise

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    losses = []
    model.train()
    bar = tqdm(batches, total=steps, desc=label, mininterval=5)
    for batch in bar:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        if after_step:
            after_step(len(losses))
    return losses


def batches(processor, count, batch, *, tasks, levels, seed, workers=1):
    return DataLoader(
        Samples(count * batch, batch, tasks, levels, seed),
        batch_size=batch,
        collate_fn=Collate(processor),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )


def train_base(family, *, steps, learning_rate, seed, start=None, width=1, batch=64, workers=1):
    """The base model from random weights: grids, captions, easy and medium questions.

    start: a base of another family, whose language model is taken over; width: times the shipped
    family's, with the learning rate divided by it.
    """
    processor = build_processor(family)
    sizes = {"text_width": 128 * width, "vision_width": 96 * width}
    model, learning_rate = build_model(processor, family, seed, **sizes), learning_rate / width
    if start is not None:
        other = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)
        model.model.language_model.load_state_dict(other.model.language_model.state_dict())
    stream = batches(processor, steps, batch, seed=seed, workers=workers, **BASE)
    losses = train(model, stream, learning_rate=learning_rate, steps=steps, label="base")
    return model, processor, losses


def language_linears(model):
    """Names of the language model's linear weights: what experts train and merging merges."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return set(mergeable(shapes, model.config.model_type))


def fine_tune(
    base_folder, tasks, *, steps, learning_rate, seed, rank=None, decay=True, snapshots=None,
    batch=64, workers=1, label="",
):  # fmt: skip
    """Fine-tune the language model's linear layers on full questions of `tasks`.

    rank: train a LoRA adapter of that rank (alpha = 2 rank, no dropout) instead of the layers.
    snapshots: steps -> folder in which the model is saved on the way.
    """
    model = AutoModelForImageTextToText.from_pretrained(base_folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(base_folder)
    weights, snapshots = dict.fromkeys(tasks, 1.0), snapshots or {}
    stream = batches(
        processor, steps, batch, tasks=weights, levels={"full": 1.0}, seed=seed, workers=workers
    )
    trained = language_linears(model)
    if rank is not None:
        modules = sorted(name.removesuffix(".weight") for name in trained)
        torch.manual_seed(seed)  # the factors' start
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules)
        model = get_peft_model(model, config)
        trained = {name for name, _ in model.named_parameters() if ".lora_" in name}

    def after_step(done):
        if done in snapshots:
            save(model, processor, snapshots[done], base_folder)

    losses = train(
        model, stream, learning_rate=learning_rate, steps=steps, parameters=trained, decay=decay,
        label=label, after_step=after_step,
    )  # fmt: skip
    return model, processor, losses


def plan(family="internvl", seed=SEEDS[0]):
    """Folder -> settings of `fine_tune`: per regime an expert a task and a mixture-training model.

    The mixture model sees as many samples as its regime's experts together.
    """
    jobs = {}
    for regime, settings in REGIMES[family].items():
        for number, task in enumerate(TASKS):
            jobs[f"{regime}/{task}"] = settings | {"tasks": [task], "seed": seed + number}
        steps = settings["steps"] * len(TASKS)
        mixture = {"tasks": list(TASKS), "seed": seed + len(TASKS), "steps": steps}
        jobs[f"{regime}/mixture"] = settings | mixture
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


def save(model, processor, folder, base_folder=None):
    """A Hugging Face folder in float16: bfloat16 would round a small task vector away.

    Of a PEFT model only the adapter, which names `base_folder` by a relative path.
    """
    half = copy.deepcopy(model).to(torch.float16)
    if isinstance(model, PeftModel):
        for name, config in half.peft_config.items():
            target = Path(folder, name if name != "default" else "")
            config.base_model_name_or_path = Path(os.path.relpath(base_folder, target)).as_posix()
        half.save_pretrained(folder, save_embedding_layers=False)
        for card in Path(folder).rglob("README.md"):
            card.unlink()
    else:
        half.save_pretrained(folder)
        processor.save_pretrained(folder)


def write_log(folder, settings, losses, started):
    """<folder>.json: settings, samples, a hundredth of the losses, seconds since `started`."""
    every = len(losses) // 100 or 1
    log = settings | {
        "samples": settings.get("batch", 64) * len(losses),
        "seconds": round(time.perf_counter() - started, 1),
        "loss_every": every,
        "loss": [
            round(float(np.mean(losses[i : i + every])), 4) for i in range(0, len(losses), every)
        ],
    }
    Path(f"{folder}.json").write_text(json.dumps(log, indent=1) + "\n")


def build(output, family="internvl", only=None, seed=SEEDS[0], width=1):
    """Train what is shipped of a family into `output`: the base, then `plan`'s models (or `only`).

    What is there is kept. Beside each folder lies a log of its settings, loss and seconds. About
    three quarters of an hour for the base on two cores, a minute or two for an expert; at twice
    the width (four times the parameters) three times that.
    """
    output = Path(output)
    base, jobs = output / "base", {"base": BASES[family] | {"width": width}} | plan(family, seed)
    for name in [only] if only else jobs:
        folder, settings = output / name, jobs[name]
        if folder.exists():
            continue
        started = time.perf_counter()
        if name == "base":
            start = output / settings["start"] if "start" in settings else None
            if start and not start.exists():
                build(start.parent, start.parent.resolve().name, only="base", width=width)
            model, processor, losses = train_base(family, **settings | {"start": start})
            settings = {"tasks": list(TASKS)} | settings
        else:
            snapshots = {n: output / path for n, path in settings.get("snapshots", {}).items()}
            model, processor, losses = fine_tune(
                base, label=name, **settings | {"snapshots": snapshots}
            )
        save(model, processor, folder, base)
        write_log(folder, settings, losses, started)
    return output
