"""What every training here does: samples drawn on the way, batches, a descent, a folder, a log."""

import copy
import json
import math
import os
import time
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

KEPT = 50
"""steps after which a descent that may be interrupted is kept"""


class Samples(Dataset):
    """Training sample i of a mixture of tasks and levels (name -> weight), drawn when asked for.

    draw: (task, split, index, level, seed) -> sample. A batch has one level: captions are long,
    answers short, and padding would cost a third.
    """

    def __init__(self, draw, count, batch, tasks, levels, seed):
        self.draw, self.count, self.batch, self.seed = draw, count, batch, seed
        self.tasks, self.levels = tasks, levels

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        def drawn(stream, number, weights):
            shares = np.array(list(weights.values()))
            rng = np.random.default_rng([self.seed, stream, number])
            return list(weights)[rng.choice(len(shares), p=shares / shares.sum())]

        level = drawn(8, index // self.batch, self.levels)
        return self.draw(drawn(9, index, self.tasks), "train", index, level, self.seed)


@dataclass(frozen=True)
class Collate:
    """Samples to one batch: input_ids and labels (b, t), padded right, and the family's images."""

    processor: object

    def __call__(self, samples):
        rows = [self.processor.conversation(s.turns) for s in samples]
        input_ids, labels = token_batch(self.processor.tokenizer, rows)
        images = self.processor.image_inputs(np.stack([s.image for s in samples]), input_ids)
        return {"input_ids": input_ids, "labels": labels, **images}

    def length(self, sample):
        """About how many tokens it has."""
        return sum(20 + len(turn[0]) + len(turn[1]) for turn in sample.turns)

    def chance(self, sample):
        """A number that differs from sample to sample."""
        return int(sample.image.sum())


def token_batch(tokenizer, rows):
    """Texts asked, said, asked, said, … a row -> input_ids and labels (b, t), padded right."""
    ids = iter(tokenizer([part for row in rows for part in row])["input_ids"])
    rows = [[next(ids) for _ in row] for row in rows]
    width = max(sum(map(len, row)) for row in rows)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for row, tokens, targets in zip(rows, input_ids, labels, strict=True):
        start = 0
        for number, part in enumerate(row):
            end = start + len(part)
            tokens[start:end] = torch.tensor(part)
            if number % 2:
                targets[start:end] = tokens[start:end]
            start = end
    return input_ids, labels


@dataclass(frozen=True)
class ByLength:
    """Samples to batches of `batch` alike in length, in an order of chance: less is padding."""

    collate: Collate
    batch: int

    def __call__(self, samples):
        ordered = sorted(samples, key=self.collate.length)
        chosen = [ordered[i : i + self.batch] for i in range(0, len(ordered), self.batch)]
        order = np.random.default_rng(self.collate.chance(samples[0])).permutation(len(chosen))
        return [self.collate(chosen[i]) for i in order]


def batches(draw, collate, count, batch, *, tasks, levels, seed, workers=1, pool=1):
    """`count` batches of training samples, drawn by processes of their own; see `Samples`.

    pool: so many batches, of one level, are drawn at once and sorted by length; see `ByLength`.
    """
    loader = DataLoader(
        Samples(draw, count * batch, batch * pool, tasks, levels, seed),
        batch_size=batch * pool,
        collate_fn=ByLength(collate, batch) if pool > 1 else lambda s: [collate(s)],
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=8 if workers else None,
    )
    return chain.from_iterable(loader)


def descend(
    loss_of, parameters, stream, *, learning_rate, steps, weight_decay=0.0, warmup=0.05, decay=True,
    label="", after_step=None, state=None, matrices=(),
):  # fmt: skip
    """AdamW with linear warm-up and cosine decay; returns the loss of every step.

    loss_of: batch -> loss; parameters: those to train, or groups {"params", "lr"}; without `decay`
    the learning rate stays; after_step: called with the number of steps done. state: a file that
    keeps every KEPT steps what is needed to go on; a descent that finds it does. matrices: others,
    hidden layers' weights, which Muon trains (Jordan et al. 2024) at AdamW's length of step.
    """
    optimizers = [torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay)]
    if matrices:
        muon = torch.optim.Muon(
            matrices, learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]

    def schedule(step):
        rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
        return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps)) if decay else rise

    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in optimizers]
    losses, steppers = [], [*optimizers, *schedulers]
    begun = time.perf_counter() - spent(state)
    if state and Path(state).exists():
        losses += _restore(torch.load(state, weights_only=True), trained, steppers)
    left = islice(stream, len(losses), None)
    bar = tqdm(left, total=steps, initial=len(losses), desc=label, mininterval=5)
    for batch in bar:
        loss = loss_of(batch)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for stepper in steppers:
            stepper.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        if after_step:
            after_step(len(losses))
        if state and len(losses) % KEPT == 0:
            _keep(state, time.perf_counter() - begun, losses, trained, steppers)
    return losses


def spent(state):
    """Seconds that an interrupted descent has taken already; 0 where nothing is kept."""
    there = state and Path(state).exists()
    return torch.load(state, weights_only=True)["seconds"] if there else 0.0


def _keep(path, seconds, losses, trained, steppers):
    """A descent so far, written whole or not at all."""
    partial = Path(f"{path}.partial")
    torch.save(
        {
            "seconds": seconds,
            "losses": losses,
            "parameters": [parameter.detach() for parameter in trained],
            "steppers": [stepper.state_dict() for stepper in steppers],
        },
        partial,
    )
    partial.replace(path)


def _restore(kept, trained, steppers):
    """Go on from what `_keep` kept; returns its losses."""
    for parameter, value in zip(trained, kept["parameters"], strict=True):
        parameter.data.copy_(value)
    for stepper, state in zip(steppers, kept["steppers"], strict=True):
        stepper.load_state_dict(state)
    return kept["losses"]


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
