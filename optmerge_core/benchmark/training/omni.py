"""Training of the Omni benchmark: a language model, three towers, and the specialists on them.

The language model learns to answer questions about clips that are described in words, with all
that they need. The towers learn what is in every patch and moment (as CLIP and Whisper come
trained). A specialist then trains its projector and a LoRA adapter on questions about its own
modality; no training example ever has two as inputs, but others may be told in words, as
LLaVA's instructions come with text. That ties each modality to the same words.
"""

import time
from itertools import chain, count, product
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, LlavaProcessor, Qwen2AudioProcessor

from optmerge_core.benchmark.models.omni import (
    MODALITIES,
    PATCH,
    PLACEHOLDERS,
    build_language_model,
    build_specialist,
    build_tokenizer,
    feature_extractor,
    image_processor,
)
from optmerge_core.benchmark.training.build import SEEDS
from optmerge_core.benchmark.training.clips import (
    CLASSES,
    HEADS,
    Described,
    Labelled,
    Perceived,
    loader,
)
from optmerge_core.benchmark.training.experts import train
from optmerge_core.benchmark.training.loop import save, write_log
from optmerge_core.checkpoints.formats import read_json
from optmerge_core.omni.model import specialist_class
from optmerge_core.omni.online import TEXT

OWN = "default"  # a PEFT model's own adapter, here for the features of its modality


def decouple(model, config, placeholder):
    """Add the adapter "text" to a PEFT model; its own now serves only the placeholders' tokens.

    placeholder: the number of the specialist's modality token. Returns the model.
    """
    divide = two_adapters(model, config)
    model.register_forward_pre_hook(
        lambda module, arguments, inputs: divide(inputs["input_ids"] == placeholder),
        with_kwargs=True,
    )
    return model


def two_adapters(model, config):
    """Add the adapter "text" to a PEFT model, which then has one for features, one for the rest.

    Returns a function to call before each forward pass with which tokens are features, (b, t).
    """
    model.add_adapter(TEXT, config)
    masks = {}

    def divide(features):
        features = features.unsqueeze(-1)
        masks[OWN], masks[TEXT] = features, ~features

    def keep(adapter):
        return lambda module, inputs, output: torch.where(masks[adapter], output, 0.0)

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter([OWN, TEXT])
            for adapter in (OWN, TEXT):
                layer.lora_B[adapter].register_forward_hook(keep(adapter))
    return divide


SEEN = {"shares": (1.0, 0.0, 0.0)}
ALL = {"shares": (0.6, 0.6, 0.6)}
SEVERAL = {"shares": (1.0, 1.0, 0.6), "least": 2}
ROUNDS = [[(600, SEEN), (1200, ALL), (1600, SEVERAL)], [(2400, ALL)]]
LANGUAGE = {"learning_rate": 2e-3, "rounds": ROUNDS, "seed": 200, "batch": 32}
TOWERS = {"learning_rate": 2e-3, "steps": 1000, "seed": 201}
STEPS = {"vision": 600, "audio": 300, "video": 300}
SPECIALIST = {"learning_rate": 2e-3, "rank": 16, "batch": 32}


class Probe(nn.Module):
    """A tower with linear heads that say what is in each of its features."""

    def __init__(self, tower, width, heads):
        super().__init__()
        self.tower = tower
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in heads.items()})

    def set_attn_implementation(self, name):
        self.tower.set_attn_implementation(name)

    def features(self, inputs):
        if "input_features" in inputs:
            return self.tower(**inputs).last_hidden_state
        return self.tower(**inputs, output_hidden_states=True).hidden_states[-2][:, 1:]

    def forward(self, inputs, labels):
        features = self.features(inputs)
        loss = sum(
            nn.functional.cross_entropy(self.heads[name](features).flatten(0, 1), label.flatten())
            for name, label in labels.items()
        )
        return SimpleNamespace(loss=loss)


def train_language_model(*, rounds, learning_rate, seed, batch=64, workers=1):
    """From random weights; the learning rate rises and falls in each of `rounds`.

    A round is a list of (steps, what `Described` is given). First comes what is seen alone,
    where nearly all questions ask what belongs to what; then comes all, then only questions that
    need several modalities. Both are learnt late, and soon where nothing else is asked.
    """
    tokenizer = build_tokenizer()
    model, losses, seeds = build_language_model(tokenizer, seed), [], count(seed, 1000)
    for number, stages in enumerate(rounds):
        streams = [
            loader(Described(tokenizer, **given), steps, own_seed, batch, workers)
            for (steps, given), own_seed in zip(stages, seeds, strict=False)
        ]
        settings = {"learning_rate": learning_rate, "steps": sum(steps for steps, _ in stages)}
        label = f"language model, round {number + 1}"
        losses += train(model, chain(*streams), **settings, label=label)
    return model, tokenizer, losses


def train_tower(modality, *, steps, learning_rate, seed, batch=64, workers=1):
    """A modality's tower, from random weights; its heads are thrown away."""
    model, _ = build_specialist(modality, seed)
    heads = {head: 1 + len(CLASSES[head]) for head in HEADS[modality]}
    probe = Probe(tower_of(model), 96, heads)
    collate = Labelled(modality, image_processor(), feature_extractor())
    stream = loader(collate, steps, seed, batch, workers)
    settings = {"learning_rate": learning_rate, "steps": steps}
    losses = train(probe, stream, **settings, label=f"{modality} tower")
    return probe, losses


def tower_of(model):
    """A specialist's tower for its own modality (Video-LLaVA has a second one, for images)."""
    towers = dict(model.model.named_children())
    return next(towers[n] for n in ("audio_tower", "video_tower", "vision_tower") if n in towers)


LINEAR = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"


def start_specialist(modality, language_model, tower, seed=0):
    """A specialist before its training: the common language model, a trained tower."""
    model, tokenizer = build_specialist(modality, seed)
    state = model.model.language_model.state_dict()
    for name, tensor in language_model.model.state_dict().items():
        state[name][: len(tensor)] = tensor
    model.lm_head.weight.data[: len(language_model.lm_head.weight)] = language_model.lm_head.weight
    tower_of(model).load_state_dict(tower.state_dict())
    return model, tokenizer


def train_specialist(
    folder, modality, *, steps, learning_rate, rank, seed, decoupled=False, batch=64, workers=1
):
    """A PEFT adapter of the specialist in `folder`: LoRA on the language model, the projector.

    decoupled: a second adapter, "text", for the tokens that are no features (DAMC).
    """
    model = specialist_class(read_json(Path(folder, "config.json"))).from_pretrained(
        folder, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    adapter = {"r": rank, "lora_alpha": rank // 2, "target_modules": LINEAR}
    projector = ["multi_modal_projector"]
    model = get_peft_model(model, LoraConfig(**adapter, modules_to_save=projector))
    if decoupled:
        number = tokenizer.convert_tokens_to_ids(PLACEHOLDERS[modality])
        decouple(model, LoraConfig(**adapter), number)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    collate = Perceived(modality, tokenizer, image_processor(), feature_extractor())
    stream = loader(collate, steps, seed, batch, workers)
    losses = train(
        model,
        stream,
        learning_rate=learning_rate,
        steps=steps,
        parameters=trained,
        label=f"{modality}, seed {seed}",
    )
    return model, losses


def processor_of(modality, tokenizer):
    """The stock processor; for video, whose stock class insists on torchvision, the tokenizer."""
    if modality == "vision":
        return LlavaProcessor(
            image_processor=image_processor(),
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    if modality == "audio":
        return Qwen2AudioProcessor(feature_extractor=feature_extractor(), tokenizer=tokenizer)
    return tokenizer


def build(output, seeds=SEEDS, modalities=MODALITIES):
    """Train what is shipped of the Omni benchmark into `output`; what is there is kept.

    language_model, then specialists/<modality> (with trained towers), then for every seed the
    adapters seed<n>/<modality> and, decoupled, seed<n>/decoupled/<modality>.
    """
    output = Path(output)
    base = output / "language_model"
    if not base.exists():
        started = time.perf_counter()
        model, tokenizer, losses = train_language_model(**LANGUAGE)
        save(model, tokenizer, base)
        write_log(base, LANGUAGE, losses, started)
    language_model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    for modality in modalities:
        folder = output / "specialists" / modality
        if folder.exists():
            continue
        started = time.perf_counter()
        probe, losses = train_tower(modality, **TOWERS)
        model, tokenizer = start_specialist(modality, language_model, probe.tower)
        save(model, processor_of(modality, tokenizer), folder)
        if modality == "video":
            image_processor().save_pretrained(folder)
        write_log(folder, TOWERS, losses, started)
    for seed in seeds:
        for decoupled, modality in product((False, True), MODALITIES):
            folder = output / f"seed{seed}" / ("decoupled" if decoupled else "") / modality
            if folder.exists() or modality not in modalities:
                continue
            started, number = time.perf_counter(), MODALITIES.index(modality)
            settings = SPECIALIST | {"steps": STEPS[modality], "seed": seed + number}
            settings |= {"decoupled": decoupled}
            specialist = output / "specialists" / modality
            model, losses = train_specialist(specialist, modality, **settings)
            save(model, None, folder, specialist)
            write_log(folder, settings, losses, started)
    return output
