"""Training of the study `smol`: a tower, a base that sees and still chats, experts, mixtures.

SmolLM2's own weights never change: what the base learnt is an adapter, and so are the experts. Its
layers compute in bfloat16 while training, adapters, tower and projector are kept in float32; only
positions that are answered go through the head, whose 49 152 words would cost as much as a third of
the layers.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor

from optmerge_core.benchmark.models.smol import build_model, build_processor
from optmerge_core.benchmark.tasks.english.samples import TASKS, sample
from optmerge_core.benchmark.training import tower
from optmerge_core.benchmark.training.chat import chat_batches, chat_loss, shipped_conversations
from optmerge_core.benchmark.training.loop import Collate, batches, descend
from optmerge_core.checkpoints.formats import ADAPTER_NAME
from optmerge_core.merging.families import mergeable

TOWER_TASKS = {"VQA": 1.0, "Geometry": 0.7, "Chart": 1.0, "OCR": 2.3, "Grounding": 1.0}
"""letters are learnt last"""
BASE_TASKS = dict.fromkeys(TASKS, 1.0) | {"OCR": 1.5}
BASE_LEVELS = {"caption": 0.2, "easy": 0.4, "medium": 0.4}
SIGHT_RATE, NAMING = 0.25, 0.3
CHAT_EVERY = 5
POOL = 4
"""batches that are sorted by length together"""
SIGHT = "model.vision_tower.", "model.multi_modal_projector."
"""what begins the names of tower and projector"""


@dataclass(frozen=True)
class Named:
    """Samples to pixel_values and what their cells should be named: (b, 49, words)."""

    processor: object
    words: tower.Words

    def __call__(self, samples):
        pixels = self.processor.image_inputs(np.stack([s.image for s in samples]), None)
        targets = torch.from_numpy(np.stack([self.words.target(s) for s in samples]))
        return pixels | {"targets": targets}


@dataclass(frozen=True)
class AskedAndNamed(Collate):
    """Samples to a batch of questions, with what the cells of their pictures should be named."""

    words: tower.Words

    def __call__(self, samples):
        return super().__call__(samples) | Named(self.processor, self.words)(samples)


def sight(model):
    """Tower and projector: name -> parameter."""
    return {n: p for n, p in model.named_parameters() if n.startswith(SIGHT)}


def train_tower(before=None, *, steps, batch, learning_rate, seed, boxes=False, state=None):
    """A model whose tower and projector name what the cells of pictures show; its losses.

    before: a folder with the sight.safetensors that they start from, if not from random weights.
    Here and below boxes: whether cells name the edges of things; state: as `descend` takes it.
    """
    processor = build_processor()
    words = tower.Words(processor.tokenizer, boxes=boxes)
    model = build_model(processor.tokenizer, seed)
    if before:
        load_sight(model, Path(before, "sight.safetensors"))
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
        tower.picture, Named(processor, words), steps, batch, tasks=TOWER_TASKS, levels=levels,
        seed=seed,
    )  # fmt: skip
    matrices = {n: p for n, p in trained.items() if p.ndim == 2}
    others = [p for n, p in trained.items() if n not in matrices]
    losses = descend(
        loss_of, others, stream, matrices=list(matrices.values()), learning_rate=learning_rate,
        steps=steps, label="tower", state=state,
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


def adapted(model, rank, seed, family="internvl", whole=None):
    """The model with LoRA factors on all linear layers of its language model, which alone train.

    Its own weights become bfloat16, tower and projector excepted. family: whose rule says where the
    factors are; whole: modules that train beside them, as PEFT's `modules_to_save`.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    modules = sorted(n.removesuffix(".weight") for n in mergeable(shapes, family))
    model.get_decoder().to(torch.bfloat16)
    model.set_attn_implementation("eager")
    model.config.get_text_config().use_cache = False  # of keys and values: nothing reads them here
    torch.manual_seed(seed)  # the factors' start
    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    peft = get_peft_model(model, LoraConfig(**settings, modules_to_save=whole))
    for layer in peft.modules():
        if isinstance(layer, LoraLayer):  # autocast makes of its float32 inputs bfloat16 again
            layer.cast_input_dtype_enabled = False
    return peft


def answer_loss(model, batch, naming=None):
    """Cross entropy of the answers' tokens, in nats; only they go through the head.

    naming: what is to be added, of the pictures' features (b, 49, width).
    """
    with torch.autocast("cpu", torch.bfloat16):
        seen = model.model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
        targets = batch["labels"][:, 1:]
        asked = targets != -100
        words = model.lm_head(seen.last_hidden_state[:, :-1][asked])
    loss = cross_entropy(words.float(), targets[asked])
    return loss if naming is None else loss + naming(seen.image_hidden_states)


def train_base(
    before, *, steps, batch, rank, learning_rate, seed, boxes=False, tasks=None, kept=1, state=None
):
    """Adapter, tower and projector of a base that answers easy questions of all kinds, and chats.

    before: a folder with the sight.safetensors that it starts from, and the adapter if there is
    one. tasks: name -> weight, if not BASE_TASKS. A batch of conversations every CHAT_EVERY steps;
    tower and projector go on at SIGHT_RATE of the rate, and go on naming what cells show (NAMING
    times that loss), or they would forget it. kept: what the adapter is multiplied by in the end: a
    little less of it forgets less of what SmolLM2 knew (chosen on validation questions).
    Returns the PEFT model and its losses.
    """
    processor = build_processor()
    words = tower.Words(processor.tokenizer, boxes=boxes)
    model = load_sight(build_model(processor.tokenizer, seed), Path(before, "sight.safetensors"))
    peft = adapted(model, rank, seed)
    if (learnt := Path(before, ADAPTER_NAME)).exists():
        set_peft_model_state_dict(peft, load_file(learnt))
    embeddings = model.get_input_embeddings().weight.detach()[words.ids].float()
    seen = sight(model)
    for parameter in seen.values():
        parameter.requires_grad_(True)
    factors = [p for n, p in model.named_parameters() if ".lora_" in n]
    spoken = chat_batches(processor.tokenizer, shipped_conversations(), 8, seed)

    def loss_of(given):
        pictures, chat = given

        def naming(features):
            return NAMING * tower.loss(features, pictures["targets"], embeddings)

        loss = answer_loss(model, pictures, naming)
        return loss + chat_loss(peft, *chat) if chat else loss

    shown = batches(
        sample, AskedAndNamed(processor, words), steps, batch, tasks=tasks or BASE_TASKS,
        levels=BASE_LEVELS, seed=seed, pool=POOL,
    )  # fmt: skip
    chats = (
        (*next(spoken), torch.Generator().manual_seed(step)) if step % CHAT_EVERY == 0 else None
        for step in range(steps)
    )
    groups = [
        {"params": factors},
        {"params": list(seen.values()), "lr": SIGHT_RATE * learning_rate},
    ]
    losses = descend(
        loss_of, groups, zip(shown, chats, strict=True), learning_rate=learning_rate, steps=steps,
        label="base", state=state,
    )  # fmt: skip
    for name in (n for n, _ in model.named_parameters() if ".lora_B." in n):
        model.get_parameter(name).data.mul_(kept)
    return peft, losses


def fine_tune(base_folder, tasks, *, steps, batch, rank, learning_rate, seed, label="", state=None):
    """An expert of the tasks: a LoRA adapter of the base, from full questions.

    Returns the PEFT model, the processor and the losses.
    """
    model = AutoModelForImageTextToText.from_pretrained(base_folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(base_folder)
    model.requires_grad_(False)
    peft = adapted(model, rank, seed)
    factors = [p for n, p in model.named_parameters() if ".lora_" in n]
    stream = batches(
        sample, Collate(processor), steps, batch, tasks=dict.fromkeys(tasks, 1.0),
        levels={"full": 1.0}, seed=seed, pool=POOL,
    )  # fmt: skip
    losses = descend(
        lambda given: answer_loss(model, given), factors, stream, learning_rate=learning_rate,
        steps=steps, label=label, state=state,
    )  # fmt: skip
    return peft, processor, losses
