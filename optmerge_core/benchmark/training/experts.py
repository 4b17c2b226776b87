"""Training of the small families: a mediocre base, experts, mixture-training models.

Everything is drawn on the fly from fixed seeds. Experts and mixture models train the language
model's linear layers only, so all that they learnt is in what merging merges.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from optmerge_core.benchmark.models.registry import build_model, build_processor
from optmerge_core.benchmark.tasks.samples import sample
from optmerge_core.benchmark.training.loop import Collate, batches, descend, save
from optmerge_core.merging.families import mergeable

BASE = {  # all there is to see, but some kinds of question only about few things
    "tasks": {"VQA": 0.22, "Geometry": 0.28, "Chart": 0.22, "OCR": 0.08, "Grounding": 0.2},
    "levels": {"grid": 0.2, "caption": 0.15, "easy": 0.3, "medium": 0.35},
}


def train(model, stream, *, parameters=None, **settings):
    """`descend` on a model's own loss; returns the loss of every step.

    parameters: names of the parameters to train (None: all, with weight decay). Products in
    bfloat16, weights in float32; attention is written out because its fused bfloat16 backward is
    the slowest step on a CPU. No attention mask is needed: padding stands to the right of a causal
    model.
    """
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameters is None or name in parameters)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()

    def loss_of(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    decay = 0.01 if parameters is None else 0.0
    return descend(loss_of, trained, stream, weight_decay=decay, **settings)


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
    stream = batches(sample, Collate(processor), steps, batch, seed=seed, workers=workers, **BASE)
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
        sample, Collate(processor), steps, batch, tasks=weights, levels={"full": 1.0}, seed=seed,
        workers=workers,
    )  # fmt: skip
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
