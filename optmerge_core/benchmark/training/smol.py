"""Training of the study `smol`: a tower, a base that sees and still chats, experts, mixtures.

SmolLM2's own weights never change: what the base learnt is an adapter, and so are the experts. Its
layers compute in bfloat16 while training, adapters, tower and projector are kept in float32; only
positions that are answered go through the head, whose 49 152 words would cost as much as a third of
the layers.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from optmerge_core.benchmark.models.smol import build_model, build_processor
from optmerge_core.benchmark.tasks.english.samples import TASKS, sample
from optmerge_core.benchmark.training import tower
from optmerge_core.benchmark.training.chat import chat_batches, chat_loss
from optmerge_core.benchmark.training.experts import Collate
from optmerge_core.merging.families import mergeable

TOWER_TASKS = {"VQA": 1.0, "Geometry": 0.7, "Chart": 1.0, "OCR": 2.3, "Grounding": 1.0}
"""letters are learnt last"""
BASE_TASKS = dict.fromkeys(TASKS, 1.0)
BASE_LEVELS = {"caption": 0.15, "easy": 0.4, "medium": 0.45}
SIGHT = "model.vision_tower.", "model.multi_modal_projector."
"""what begins the names of tower and projector"""


class Pictures(Dataset):
    """Training sample i of a mixture of tasks and levels, drawn when asked for.

    All tasks of `tasks` (name -> weight) in turn; a batch has one level.
    """

    def __init__(self, count, batch, tasks, levels, seed):
        self.count, self.batch, self.seed = count, batch, seed
        self.tasks, self.levels = tasks, levels

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        def drawn(stream, number, weights):
            shares = np.array(list(weights.values()))
            rng = np.random.default_rng([self.seed, stream, number])
            return list(weights)[rng.choice(len(shares), p=shares / shares.sum())]

        level = drawn(8, index // self.batch, self.levels)
        return sample(drawn(9, index, self.tasks), "train", index, level, self.seed)


@dataclass(frozen=True)
class Named:
    """Samples to pixel_values and what their cells should be named: (b, 49, words)."""

    processor: object
    words: tower.Words

    def __call__(self, samples):
        pixels = self.processor.image_inputs(np.stack([s.image for s in samples]), None)
        targets = torch.from_numpy(np.stack([self.words.target(s) for s in samples]))
        return pixels | {"targets": targets}


def batches(collate, count, batch, *, tasks, levels, seed, workers=1):
    """`count` batches of training pictures, drawn by a process of their own."""
    pictures = Pictures(count * batch, batch, tasks, levels, seed)
    return DataLoader(
        pictures,
        batch_size=batch,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=8 if workers else None,
    )


def descend(
    loss_of, parameters, stream, *, learning_rate, steps, warmup=0.05, label="", after=None
):  # fmt: skip
    """AdamW with linear warm-up and cosine decay; returns the loss of every step.

    loss_of: batch -> loss; parameters: those to train, or groups {"params", "lr"}.
    """
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def schedule(step):
        rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
        return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    scheduler, losses = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule), []
    bar = tqdm(stream, total=steps, desc=label, mininterval=5)
    for batch in bar:
        loss = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        if after:
            after(len(losses))
    return losses


def sight(model):
    """Tower and projector: name -> parameter."""
    return {n: p for n, p in model.named_parameters() if n.startswith(SIGHT)}


def train_tower(*, steps=3000, batch=24, learning_rate=1e-3, seed=0, after=None):
    """A model whose tower and projector name what the cells of pictures show; its losses."""
    processor = build_processor()
    model, words = build_model(processor.tokenizer, seed), tower.Words(processor.tokenizer)
    embeddings = model.get_input_embeddings().weight.detach()[words.ids]
    model.requires_grad_(False)
    trained = sight(model)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    model.set_attn_implementation("eager")

    def loss_of(given):
        with torch.autocast("cpu", torch.bfloat16):
            features = model.get_image_features(given["pixel_values"]).pooler_output
        return tower.loss(features, given["targets"], embeddings)

    levels = dict.fromkeys(tower.LEVELS, 1.0)
    stream = batches(
        Named(processor, words), steps, batch, tasks=TOWER_TASKS, levels=levels, seed=seed
    )
    losses = descend(
        loss_of, list(trained.values()), stream, learning_rate=learning_rate, steps=steps,
        label="tower", after=after and (lambda done: after(done, model)),
    )  # fmt: skip
    return model, losses


def save_sight(model, path):
    """Tower and projector alone, float16."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({n: p.detach().half().contiguous() for n, p in sight(model).items()}, path)


def load_sight(model, path):
    """What `save_sight` wrote, into a model."""
    given = load_file(path)
    for name, parameter in sight(model).items():
        parameter.data.copy_(given[name])
    return model


def adapted(model, rank, seed):
    """The model with LoRA factors on all linear layers of its language model, which alone train.

    Its own weights become bfloat16, tower and projector excepted.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    modules = sorted(n.removesuffix(".weight") for n in mergeable(shapes, "internvl"))
    model.model.language_model.to(torch.bfloat16)
    model.set_attn_implementation("eager")
    torch.manual_seed(seed)  # the factors' start
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules))


def answer_loss(model, batch):
    """Cross entropy of the answers' tokens, in nats; only they go through the head."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
        targets = batch["labels"][:, 1:]
        asked = targets != -100
        words = model.lm_head(hidden.last_hidden_state[:, :-1][asked])
    return cross_entropy(words.float(), targets[asked])


def train_base(
    tower_file, texts, *, steps, batch=24, rank=16, learning_rate=6e-4, sight_rate=3e-4,
    chat_every=5, seed=0,
):  # fmt: skip
    """Adapter, tower and projector of a base that answers easy questions of all kinds, and chats.

    texts: of `chat.conversations`, one batch of them every `chat_every` steps. Returns the PEFT
    model and its losses.
    """
    processor = build_processor()
    model = load_sight(build_model(processor.tokenizer, seed), tower_file)
    peft = adapted(model, rank, seed)
    seen = sight(model)
    for parameter in seen.values():
        parameter.requires_grad_(True)
    factors = [p for n, p in model.named_parameters() if ".lora_" in n]
    spoken = chat_batches(processor.tokenizer, texts, 8, seed)
    generator, count = torch.Generator().manual_seed(seed), iter(range(10**9))

    def loss_of(given):
        loss = answer_loss(model, given)
        if next(count) % chat_every == 0:
            loss = loss + chat_loss(peft, *next(spoken), generator)
        return loss

    stream = batches(
        Collate(processor), steps, batch, tasks=BASE_TASKS, levels=BASE_LEVELS, seed=seed
    )
    groups = [{"params": factors}, {"params": list(seen.values()), "lr": sight_rate}]
    losses = descend(
        loss_of, groups, stream, learning_rate=learning_rate, steps=steps, label="base"
    )
    return peft, losses


def fine_tune(
    base_folder, tasks, *, steps, learning_rate, seed, rank=8, batch=16, label="", after=None
):  # fmt: skip
    """An expert of the tasks: a LoRA adapter of the base, from full questions; and its losses."""
    model = AutoModelForImageTextToText.from_pretrained(base_folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(base_folder)
    model.requires_grad_(False)
    peft = adapted(model, rank, seed)
    factors = [p for n, p in model.named_parameters() if ".lora_" in n]
    stream = batches(
        Collate(processor), steps, batch, tasks=dict.fromkeys(tasks, 1.0), levels={"full": 1.0},
        seed=seed,
    )  # fmt: skip
    losses = descend(
        lambda given: answer_loss(model, given), factors, stream, learning_rate=learning_rate,
        steps=steps, label=label, after=after and (lambda done: after(done, peft)),
    )  # fmt: skip
    return peft, losses
