"""What is written on, paper, signs, price tags and notes, and where its lines stand."""

import numpy as np
from PIL import Image, ImageDraw

from optmerge_core.benchmark.tasks.english.drawing import CELL, CELLS, IMAGE_SIZE
from optmerge_core.benchmark.tasks.english.lettering import FACES, HANDS, advances, fitting, write
from optmerge_core.benchmark.tasks.scenes import choice

INKS = ((20, 20, 20), (30, 40, 110), (120, 20, 30), (20, 80, 40), (80, 40, 110), (90, 60, 30))
SIGNS = ((180, 30, 30), (25, 70, 160), (20, 110, 60), (60, 60, 60), (110, 50, 120), (150, 80, 20))
LIGHT = ((255, 255, 255), (255, 245, 190), (235, 245, 255))
TAGS = ((250, 220, 90), (250, 235, 215), (190, 230, 170), (250, 180, 120), (240, 240, 240))


def ground(rng, surface, quiet):
    """A picture of a surface -> (picture, ink, (left, right) that may be written on)."""
    pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), rng.integers(225, 256, 3), np.int16)
    kind = "plain" if quiet else choice(rng, ("plain", "gradient", "noise", "both"))
    if kind in ("gradient", "both"):
        one, other = rng.integers(165, 256, (2, 3))
        share = np.linspace(0, 1, IMAGE_SIZE)[:, None, None]
        share = share if rng.random() < 0.5 else share.swapaxes(0, 1)
        pixels = (one + (other - one) * share + np.zeros_like(pixels)).astype(np.int16)
    if kind in ("noise", "both"):
        strength = int(rng.integers(10, 36))
        pixels = pixels - rng.integers(0, strength, pixels.shape, dtype=np.int16)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw, ink = ImageDraw.Draw(image), choice(rng, INKS)
    edge = int(rng.integers(2, 6))
    box = (edge, edge, IMAGE_SIZE - 1 - edge, IMAGE_SIZE - 1 - edge)
    if surface == "sign":
        plate, ink = choice(rng, SIGNS), choice(rng, LIGHT)
        if rng.random() < 0.3:
            plate, ink = ink, plate
        draw.rounded_rectangle(box, int(rng.integers(0, 14)), plate, ink, 2)
    elif surface == "price tag":
        left, top, right, bottom = box
        draw.rectangle((0, 0, IMAGE_SIZE, IMAGE_SIZE), choice(rng, SIGNS))
        corners = [(left + 16, top), (right - 16, top), (right, top + 18), (right, bottom)]
        draw.polygon([*corners, (left, bottom), (left, top + 18)], choice(rng, TAGS), ink)
        draw.ellipse((51, top + 4, 60, top + 13), (90, 90, 90), ink)
    elif surface == "note":
        if rng.random() < 0.5:
            draw.rectangle(box, choice(rng, ((255, 245, 150), (255, 255, 255), (220, 240, 255))))
        for y in range(box[1] + int(rng.integers(8, 22)), box[3], int(rng.integers(14, 24))):
            draw.line((box[0], y, box[2], y), (190, 205, 225))
    return image, ink, (edge + 3, IMAGE_SIZE - edge - 3)


def draw_text(rng, written, level):
    """The picture of a text, its cells, and the faces of its lines."""
    easy = level == "easy"
    image, ink, (left, right) = ground(rng, written.surface, easy)
    often = 0.6 if written.surface == "note" else 0.4 if level == "full" else 0.1
    hand = rng.random() < often
    face = choice(rng, HANDS) if hand else choice(rng, tuple(FACES))
    heights = (14, 20) if easy else (11, 17)
    styles = [fitting(rng, line, face, heights, right - left) for line in written.lines]
    top = 24 if written.surface == "price tag" else 8
    baselines = (in_rows if level == "full" else anywhere)(rng, styles, top)
    middle, cells = rng.random() < 0.5, {}
    for line, (face, height), y in zip(written.lines, styles, baselines, strict=True):
        free = right - left - advances(line, face, height)[-1]
        x = left + (free / 2 if middle else rng.uniform(0, free))
        for character, cell in write(rng, image, line, face, height, (round(x), y), ink):
            cells.setdefault(cell, []).append(character)
    cells = {cell: characters[:3] for cell, characters in cells.items()}
    return image, cells, [face for face, _ in styles]


def anywhere(rng, styles, top):
    """Where lines of (face, height) stand between `top` and the picture's edge, in even steps."""
    bottom = IMAGE_SIZE - 10
    room = (bottom - top) / len(styles)  # of a line, with the space around it
    pitch = rng.uniform(min(room, 1.75 * max(h for _, h in styles)), room)
    y = top + rng.uniform(0, bottom - top - pitch * len(styles))
    return [round(y + pitch * (i + 1) - (pitch - h) / 2) for i, (_, h) in enumerate(styles)]


def in_rows(rng, styles, top):
    """The same, each line's middle near that of a row of cells, no two in neighbouring rows."""
    rows = np.arange(-(-top // CELL), CELLS - 1)
    spare = len(rows) - (2 * len(styles) - 1)
    before = np.sort(rng.integers(0, spare + 1, len(styles)))
    chosen = [int(rows[2 * i + skip]) for i, skip in enumerate(before)]
    off = rng.integers(-2, 3, len(styles))
    return [
        round(CELL * (row + 0.5) + height / 2) + int(d)
        for row, (_, height), d in zip(chosen, styles, off, strict=True)
    ]
