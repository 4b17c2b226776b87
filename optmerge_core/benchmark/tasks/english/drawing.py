"""What all pictures of the study `smol` share: size, cells, turns, and who may see what."""

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image

IMAGE_SIZE = 112
CELLS = 7  # image tokens each way
CELL = IMAGE_SIZE // CELLS  # pixels of the picture that one image token stands for, each way
UNITS = 100  # a box's numbers count hundredths of the picture's width or height, 0 to 99


class Turn(NamedTuple):
    """A question, its answer and the kind of question (the sub-task).

    `blind`: a language model may answer it without the picture, by what it knows.
    `held_out`: a question that training never asks (its fact, thing or place is kept for tests).
    """

    question: str
    answer: str
    kind: str
    blind: bool = False
    held_out: bool = False


@dataclass
class Drawing:
    """A picture, RGB 112 x 112, the turns about it, and what each of its cells shows.

    boxes: (row, column) -> the box in pixels of the thing that is seen there, if it is one.

    cells: (row, column) -> words of what that cell shows, most important first; what the tower
    learns to name. Background is not listed.
    """

    image: Image.Image
    turns: list[Turn]
    cells: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    boxes: dict[tuple[int, int], tuple[int, int, int, int]] = field(default_factory=dict)


def digest(*parts):
    """A number that depends on the texts alone, the same on every machine."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def reserved(*parts, share=0.25):
    """Whether a thing in a place, a fact or a word is kept from training, by its hash."""
    return digest("reserved", *parts) % 1000 < 1000 * share


def box_text(box):
    """A box in pixels (left, top, right, bottom) as people would write it: '12 30 48 75'."""
    scaled = (round(v / IMAGE_SIZE * UNITS) for v in box)
    return " ".join(str(min(max(v, 0), UNITS - 1)) for v in scaled)


def covered(box, least=0.25):
    """(row, column) of the cells of which a box in pixels covers at least a share."""
    left, top, right, bottom = box
    found = []
    for row in range(CELLS):
        for column in range(CELLS):
            width = min(right, (column + 1) * CELL) - max(left, column * CELL)
            height = min(bottom, (row + 1) * CELL) - max(top, row * CELL)
            if width > 0 and height > 0 and width * height >= least * CELL * CELL:
                found.append((row, column))
    return found
