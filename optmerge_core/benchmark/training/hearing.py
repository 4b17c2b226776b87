"""The ear's projector learns to write down what it hears, before a language model listens.

Whisper's encoder stays as it is, so its features are computed once. A token of 80 ms is drawn
towards SmolLM2's own embedding of the word that is said there, or towards one more vector where
nothing new is; which token says which word nobody tells: connectionist temporal classification
(Graves et al. 2006) sums over all the ways.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import ctc_loss, normalize
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from optmerge_core.benchmark.models.ear import TOKENS, build_ear, spectrograms
from optmerge_core.benchmark.models.smol import build_tokenizer
from optmerge_core.benchmark.tasks.speech import say, text, voice
from optmerge_core.benchmark.tasks.spoken import unheard
from optmerge_core.benchmark.training.loop import descend, write_log
from optmerge_core.benchmark.training.tower import SHARPNESS

EAR = {"learning_rate": 2e-3, "steps": 500, "batch": 64, "seed": 0, "clips": 4000}
ASKED = 300
"""utterances of validation and of test, by voices that training has not heard"""


@dataclass(frozen=True)
class Heard:
    """Utterances: the encoder's stacked frames, (n, TOKENS, 1536) float16, and what was said."""

    frames: torch.Tensor
    texts: list[str]


@torch.inference_mode()
def hear(model, tokenizer, split, count, seed):
    """`count` utterances of a split, each within one window, through the encoder."""
    frames, texts = [], []
    bar = tqdm(total=count, desc=f"listening ({split})", mininterval=5)
    index = 0
    while len(texts) < count:
        rng = np.random.default_rng([seed, 31, index])
        index += 1
        said = text(rng, split)
        if split != "test" and unheard(said):
            continue
        heard = spectrograms([say(rng, said, voice(rng, split))])
        # Every token needs one of sound, and between two that are alike one more.
        if len(heard) > 1 or 2 * len(tokens_of(tokenizer, said)) > TOKENS:
            continue
        features = model.model.audio_tower(heard).last_hidden_state
        frames.append(features.reshape(TOKENS, -1).half())
        texts.append(said)
        bar.update()
    return Heard(torch.stack(frames), texts)


def tokens_of(tokenizer, said):
    """A text's tokens as in the middle of a sentence, with a space before it."""
    return tokenizer(f" {said}", add_special_tokens=False)["input_ids"]


class Written:
    """The tokens that can be heard, and how likely each is for features: `nothing` is the last.

    ids (words,): SmolLM2's numbers of them; nothing (width,) is trained.
    """

    def __init__(self, tokenizer, texts, embeddings):
        self.tokenizer = tokenizer
        self.ids = torch.tensor(sorted({t for said in texts for t in tokens_of(tokenizer, said)}))
        self._row = {int(token): row for row, token in enumerate(self.ids)}
        known = embeddings.detach()[self.ids].float()
        self.centre = known.mean(dim=0)
        self.words = normalize(known - self.centre, dim=-1)
        self.length = (known - self.centre).norm(dim=-1).mean()
        self.nothing = torch.nn.Parameter(-self.words.mean(dim=0))

    def targets(self, said):
        """Rows of a text's tokens; what was never heard in training has none and is left out."""
        rows = [self._row[t] for t in tokens_of(self.tokenizer, said) if t in self._row]
        return torch.tensor(rows)

    def log_probabilities(self, features):
        """(…, width) -> (…, words + 1), by cosine to the embeddings, from their mean."""
        rows = torch.cat([self.words, normalize(self.nothing, dim=0)[None]])
        logits = normalize(features.float() - self.centre, dim=-1) @ rows.T
        return (SHARPNESS * logits).log_softmax(-1)

    def loss(self, features, texts):
        """Mean CTC loss, in nats a token, and of the features' length with the embeddings'."""
        targets = [self.targets(said) for said in texts]
        lengths = torch.tensor([len(t) for t in targets])
        found = ctc_loss(
            self.log_probabilities(features).transpose(0, 1),
            pad_sequence(targets, batch_first=True),
            torch.full((len(texts),), features.shape[1]),
            lengths,
            blank=len(self.ids),
        )
        length = (features.float() - self.centre).norm(dim=-1).log() - self.length.log()
        return found + 0.1 * length.square().mean()

    def read(self, features):
        """Features of one utterance, (TOKENS, width) -> the rows heard, repetitions left out."""
        best = self.log_probabilities(features).argmax(-1).tolist()
        kept = [row for row, before in zip(best, [None, *best], strict=False) if row != before]
        return [row for row in kept if row != len(self.ids)]


def errors(heard, wanted):
    """Levenshtein's distance: insertions, deletions and replacements that make one the other."""
    row = list(range(len(wanted) + 1))
    for i, mine in enumerate(heard, 1):
        before, row = row, [i]
        for j, theirs in enumerate(wanted, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (mine != theirs)))
    return row[-1]


def build(output):
    """Train the ear into `output`/ear, if it is not there: its projector, float16, and a log.

    Ten minutes on two cores, most of them listening. The log has the share of tokens that it gets
    wrong of utterances by voices of validation and test.
    """
    started, folder = time.perf_counter(), Path(output, "ear")
    if folder.exists():
        return
    model, written, losses = train_projector(**EAR)
    found = {}
    for split in ("validation", "test"):
        heard = hear(model, written.tokenizer, split, ASKED, EAR["seed"])
        found[split] = round(token_errors(model, written, heard), 4)
    projector = model.model.multi_modal_projector.state_dict()
    folder.mkdir(parents=True)
    half = {name: weight.half() for name, weight in projector.items()}
    save_file(half, folder / "projector.safetensors")
    write_log(folder, EAR | {"token_errors": found}, losses, started)


def train_projector(*, steps, batch, learning_rate, seed, clips):
    """An ear whose projector writes down what it hears, its `Written`, and its losses."""
    tokenizer = build_tokenizer()
    model = build_ear(tokenizer, seed)
    model.requires_grad_(False)
    heard = hear(model, tokenizer, "train", clips, seed)
    written = Written(tokenizer, heard.texts, model.get_input_embeddings().weight)
    projector = model.model.multi_modal_projector
    projector.requires_grad_(True)
    rng = np.random.default_rng([seed, 32])

    def loss_of(rows):
        features = projector(heard.frames[torch.from_numpy(rows)].float())
        return written.loss(features, [heard.texts[i] for i in rows])

    losses = descend(
        loss_of, [*projector.parameters(), written.nothing],
        (rng.choice(clips, batch, replace=False) for _ in range(steps)),
        learning_rate=learning_rate, steps=steps, label="ear",
    )  # fmt: skip
    return model, written, losses


@torch.inference_mode()
def token_errors(model, written, heard):
    """Share of tokens that are not as they were said: errors over tokens said."""
    wrong = said = 0
    for frames, text_ in zip(heard.frames, heard.texts, strict=True):
        features = model.model.multi_modal_projector(frames.float())
        wanted = written.targets(text_).tolist()
        wrong += errors(written.read(features), wanted)
        said += len(wanted)
    return wrong / said
