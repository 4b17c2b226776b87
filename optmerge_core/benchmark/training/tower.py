"""The tower of the study `smol` learns to name what it sees, before a language model listens.

Every image token stands for a cell of the picture. Its projection is drawn towards the language
model's own embeddings of the words for what the cell shows and where the cell is, so that image
tokens are almost words when the language model first meets them.
"""

from itertools import chain

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize

from optmerge_core.benchmark.tasks.english.drawing import CELLS, box_text
from optmerge_core.benchmark.tasks.english.samples import TASKS, sample

LEVELS = ("caption", "easy", "medium", "full")
PLACE = 0.25  # share of a cell's target that says where it is: its row's letter, its column's digit
EDGES = 0.5  # share that says instead where the thing is that is seen there, if it is one
EMPTY = " empty"
NUMBERS = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
SHARPNESS = 20.0  # cosines to the embeddings, times this, are the logits


def picture(task, split, index, level, seed):
    """A sample; of texts every second one is a page of letters, which nobody asks about."""
    return sample(task, split, index, "page" if task == "OCR" and index % 2 else level, seed)


def words_of(sample):
    """(row, column) -> words of all cells of a sample, each a list of what is named by a token."""
    found = {(r, c): [] for r in range(CELLS) for c in range(CELLS)}
    for cell, words in sample.cells.items():
        spelt = 0  # letters and digits that the cell has shown
        for word in words:
            if len(word) > 1 and word.isalpha():
                found[cell].append([f" {word}"])
            else:
                found[cell].append([_spelt(c, spelt + i) for i, c in enumerate(word)])
                spelt += len(word)
    return {cell: words or [[EMPTY]] for cell, words in found.items()}


def _spelt(character, place):
    """What names a letter or digit that is not its cell's first: o, then ` o`; 7, then ` seven`."""
    if place and character.isdigit():
        return " " + NUMBERS[int(character)]
    return f" {character}" if place and character.isalpha() else character


class Words:
    """The tokens that cells can be named by, and a picture's target over them.

    boxes: cells where a thing is seen also say which tenth of the picture its left, upper, right
    and lower edge are in, each in words of its own: what a box is told from.
    """

    def __init__(self, tokenizer, count=400, boxes=False):
        self.tokenizer, self._tokens, self.boxes = tokenizer, {}, boxes
        self.places = [self.tokens(f" {name}")[-1] for name in "ABCDEFG0123456"[: 2 * CELLS]]
        tenths = "0123456789", [f" {name}" for name in NUMBERS], "KLMNOPQRST", "klmnopqrst"
        self.edges = [[self.tokens(name)[-1] for name in names] for names in tenths]
        found = set(chain(self.places, *(self.edges if boxes else ())))
        for task in TASKS:
            for index in range(count):
                drawn = picture(task, "train", index, LEVELS[index % len(LEVELS)], seed=77)
                cells = chain.from_iterable(words_of(drawn).values())
                found.update(t for n in chain.from_iterable(cells) for t in self.tokens(n))
        self.ids = torch.tensor(sorted(found))
        self._row = {int(token): row for row, token in enumerate(self.ids)}

    def tokens(self, word):
        if word not in self._tokens:
            self._tokens[word] = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        return self._tokens[word]

    def target(self, drawn):
        """(49, words): what each cell should be named, a distribution."""
        target = np.zeros((CELLS**2, len(self.ids)), dtype=np.float32)
        for (row, column), words in words_of(drawn).items():
            line = target[row * CELLS + column]
            box = drawn.boxes.get((row, column)) if self.boxes else None
            places = [self.places[row], self.places[CELLS + column]]
            if box:
                told = zip(self.edges, box_text(box).split(), strict=True)
                places = [tenths[int(edge) // 10] for tenths, edge in told]
            place = EDGES if box else PLACE
            shares = 1 / np.arange(1, len(words) + 1)  # the first letter of a cell weighs most
            for word, share in zip(words, shares / shares.sum(), strict=True):
                tokens = [self._row[t] for n in word for t in self.tokens(n) if t in self._row]
                for token in tokens:
                    line[token] += (1 - place) * share / len(tokens)
            for token in places:
                line[self._row[token]] += place / len(places)
        return target


def loss(features, targets, embeddings):
    """Cross entropy of the cells' names, and of the features' length with the embeddings'.

    features (b, 49, width), targets (b, 49, words), embeddings (words, width). Both are taken from
    the embeddings' mean, a direction which all of SmolLM2's words share.
    """
    centre = embeddings.mean(dim=0)
    features, embeddings = features.float() - centre, embeddings - centre
    logits = SHARPNESS * normalize(features, dim=-1) @ normalize(embeddings, dim=-1).T
    length = features.norm(dim=-1).log() - embeddings.norm(dim=-1).mean().log()
    return cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1)) + 0.1 * length.square().mean()
