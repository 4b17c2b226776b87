"""Training of the study `smol_omni`: SmolLM2 in text, then what sees and what hears, on that.

SmolLM2's own weights never change, nor the towers': what is trained are LoRA adapters and, of the
specialists, projectors. Every stage learns the same exchanges; the language model all in words, the
vision specialist with the picture as such, the speech specialist with the voice as such (and the
picture in words). No example ever has both.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from optmerge_core.benchmark.models.ear import TOKENS
from optmerge_core.benchmark.models.smol import build_processor, build_tokenizer, language_model
from optmerge_core.benchmark.models.spoken import open_specialist, places, prompt
from optmerge_core.benchmark.tasks.spoken import exchange
from optmerge_core.benchmark.training.chat import chat_batches, chat_loss, shipped_conversations
from optmerge_core.benchmark.training.listening import SPOKEN, Clip
from optmerge_core.benchmark.training.loop import Collate, batches, descend, token_batch
from optmerge_core.benchmark.training.omni import two_adapters
from optmerge_core.benchmark.training.smol import CHAT_EVERY, POOL, adapted
from optmerge_core.evaluation.metrics import normalised

PROJECTOR = "multi_modal_projector"
READ = {"scene": 5.0, "text": 2.0, "knowledge": 1.5, "spell": 0.5, "repeat": 0.7, "write": 0.5}
SEEN = {"scene": 3.0, "text": 2.0}
"""Skill -> how often the language model reads it, and the vision specialist sees it."""
LONGEST = 28  # tokens of an answer
CHATS = 8  # conversations in a batch of them


@dataclass(frozen=True)
class Asks(Collate):
    """Exchanges, or clips of them, to a batch; picture and voice: as `prompt` takes them.

    processor: smol's. The batch has input_ids and labels (b, t), and where they are given as such
    pixel_values (b, 3, 112, 112) and frames (all tokens of sound, 1536).
    """

    picture: str | None = "told"
    voice: str | None = "written"

    def __call__(self, items):
        tokenizer = self.processor.tokenizer
        rows = [(self.prompt(x), of(x).asked.answer + tokenizer.eos_token) for x in items]
        ids, labels = token_batch(tokenizer, rows)
        return {"input_ids": ids, "labels": labels} | self.features(items)

    def prompt(self, item):
        tokens = len(item.frames) if isinstance(item, Clip) else TOKENS
        return prompt(of(item), self.picture, self.voice, tokens)

    def features(self, items):
        """What is given as such, in the order of the rows."""
        found = {}
        if self.voice == "heard":
            found["frames"] = torch.cat([item.frames.float() for item in items])
        shown = [of(item).shown for item in items]
        if self.picture == "seen" and any(shown):
            images = np.stack([s.image for s in shown if s is not None])
            found |= self.processor.image_inputs(images, None)
        return found

    def length(self, item):
        return len(self.prompt(item).replace("<IMG_CONTEXT>", "....").replace("[AUDIO]", "...."))

    def chance(self, item):
        return sum(map(ord, self.prompt(item)))


def of(item):
    """A clip's exchange, or the exchange itself."""
    return item.exchange if isinstance(item, Clip) else item


def embedded(model, batch):
    """A batch's prompts with the features in place: (b, t, width). Towers do not train."""
    ids = batch["input_ids"]
    found = model.get_input_embeddings()(ids)
    for name, token in places().items():
        if name in batch:
            if name == "frames":
                features = model.model.multi_modal_projector(batch[name])
            else:
                features = model.get_image_features(batch[name]).pooler_output
            where = (ids == token).unsqueeze(-1).expand_as(found)
            found = found.masked_scatter(where, features.to(found.dtype))
    return found


def answer_loss(model, batch):
    """Cross entropy of the answers' tokens, in nats; only they go through the head."""
    with torch.autocast("cpu", torch.bfloat16):
        seen = model.get_decoder()(inputs_embeds=embedded(model, batch)).last_hidden_state
        targets = batch["labels"][:, 1:]
        asked = targets != -100
        words = model.lm_head(seen[:, :-1][asked])
    return cross_entropy(words.float(), targets[asked])


def factors_of(model):
    """The parameters that train: factors, and what PEFT trains whole."""
    return [p for p in model.parameters() if p.requires_grad]


# ---------------------------------------------------------------- the language model


def train_language_model(*, steps, batch, rank, learning_rate, seed, state=None):
    """An adapter of SmolLM2 that answers this study's questions about descriptions, and chats.

    A batch of conversations every CHAT_EVERY steps holds it to the original's. state: as `descend`
    takes it, here and below. Returns the PEFT model and its losses.
    """
    model, processor = copy.deepcopy(language_model()), build_processor()
    peft = adapted(model, rank, seed, family="llama")
    spoken = chat_batches(build_tokenizer(), shipped_conversations(), CHATS, seed)
    told = batches(
        exchange, Asks(processor), steps, batch, tasks=READ, levels={"full": 1.0}, seed=seed,
        pool=POOL,
    )  # fmt: skip
    chats = (
        (*next(spoken), torch.Generator().manual_seed(step)) if step % CHAT_EVERY == 0 else None
        for step in range(steps)
    )

    def loss_of(given):
        loss = answer_loss(model, given[0])
        return loss + chat_loss(peft, *given[1]) if given[1] else loss

    losses = descend(
        loss_of, factors_of(model), zip(told, chats, strict=True), learning_rate=learning_rate,
        steps=steps, label="language model", state=state,
    )  # fmt: skip
    return peft, losses


# ---------------------------------------------------------------- specialists


def train_specialist(
    folder, modality, *, steps, batch, rank, learning_rate, seed, clips=None, projector=None,
    words=True, decoupled=False, state=None,
):  # fmt: skip
    """An adapter of the specialist in a folder: LoRA on the language model, and its projector.

    clips: `Clips`, of the speech specialist; projector: what it starts with (name -> tensor;
    default: the folder's). words: whether the factors train, else the projector alone. decoupled:
    the projector stays, and a second adapter, "text", serves the tokens that are no features.
    Returns the PEFT model and its losses.
    """
    model, processor = open_specialist(folder), build_processor()
    model.requires_grad_(False)
    model.lm_head.to(torch.bfloat16)  # Voxtral's is no part of the decoder
    if projector:
        model.model.multi_modal_projector.load_state_dict(projector)
    whole = None if decoupled else [PROJECTOR]
    peft = adapted(model, rank, seed, whole=whole)
    divide = None
    if decoupled:
        own = peft.peft_config["default"]
        settings = {"r": rank, "lora_alpha": own.lora_alpha, "target_modules": own.target_modules}
        divide = two_adapters(peft, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(words)
    collate, draw, skills = inputs_of(modality, processor, clips)
    token = list(places().values())[modality == "speech"]

    def loss_of(given):
        if divide:
            divide(given["input_ids"] == token)
        return answer_loss(model, given)

    stream = batches(
        draw, collate, steps, batch, tasks=skills, levels={"full": 1.0}, seed=seed, pool=POOL,
        workers=0 if clips else 1,
    )  # fmt: skip
    losses = descend(
        loss_of, factors_of(model), stream, learning_rate=learning_rate, steps=steps,
        label=f"{modality}{', decoupled' * decoupled}", state=state,
    )  # fmt: skip
    return peft, losses


def inputs_of(modality, processor, clips=None):
    """How a specialist is asked: what makes batches, what draws samples, and skill -> weight."""
    if modality == "vision":
        return Asks(processor, picture="seen"), exchange, SEEN
    skills = {s: w for s, w in SPOKEN.items() if s in clips.clips}
    return Asks(processor, voice="heard"), clips.draw, skills


def own_projector(adapter):
    """The projector in a trained specialist's adapter, float32: as `train_specialist` takes it."""
    found = load_file(f"{adapter}/adapter_model.safetensors")
    return {
        name.partition(f"{PROJECTOR}.")[2]: tensor.float()
        for name, tensor in found.items()
        if f"{PROJECTOR}." in name
    }


# ---------------------------------------------------------------- is it good enough to go on?


def is_right(skill, said, answer):
    """Whether an answer is right; of what is written down or spelt, letters and digits alone."""
    if skill in ("write", "spell"):
        return letters(said) == letters(answer)
    return normalised(said) == normalised(answer)


def letters(text):
    return [c for c in text.lower() if c.isalnum()]


@torch.inference_mode()
def greedy(model, embeddings, mask, tokenizer):
    """Texts after prompts (b, t, width), padded on the left; mask (b, t)."""
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.generate(
            inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=LONGEST, do_sample=False,
            use_cache=True, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


@torch.inference_mode()
def accuracy(model, asks, items, batch=16):
    """Per cent of right answers to exchanges or clips: skill -> accuracy, with one decimal."""
    tokenizer, right = asks.processor.tokenizer, {}
    for start in range(0, len(items), batch):
        some = sorted(items[start : start + batch], key=asks.length)
        given = tokenizer([asks.prompt(x) for x in some], padding=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = embedded(model, dict(given) | asks.features(some))
        said = greedy(model, embeddings, given["attention_mask"], tokenizer)
        for item, text in zip(some, said, strict=True):
            skill, answer = of(item).skill, of(item).asked.answer
            right.setdefault(skill, []).append(is_right(skill, text, answer))
    return {skill: round(100 * float(np.mean(found)), 1) for skill, found in sorted(right.items())}


def validation(skills, count, seed=0):
    """`count` exchanges of each skill from the validation split."""
    return [exchange(skill, "validation", i, seed=seed) for skill in skills for i in range(count)]
