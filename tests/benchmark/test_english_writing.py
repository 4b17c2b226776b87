"""Written words: what is asked is what is drawn, and training never shows what is reserved."""

import numpy as np
import pytest

from optmerge_core.benchmark.tasks.english.drawing import reserved
from optmerge_core.benchmark.tasks.english.lettering import FACES, HANDS, advances, words
from optmerge_core.benchmark.tasks.english.surfaces import in_rows
from optmerge_core.benchmark.tasks.english.writing import ABOUT, Text, about, ocr, questions, tag

LEVELS = ("caption", "easy", "medium", "full")


def drawn(split, level="full", count=200):
    return [ocr(np.random.default_rng([5, i]), split, level) for i in range(count)]


def characters(drawing):
    return sorted("".join("".join(words) for words in drawing.cells.values()))


@pytest.mark.parametrize("level", LEVELS)
def test_a_drawing_is_decided_by_its_generator(level):
    one, other = (ocr(np.random.default_rng(3), "train", level) for _ in range(2))
    assert one.image.tobytes() == other.image.tobytes() and one.image.size == (112, 112)
    assert (one.turns, one.cells) == (other.turns, other.cells)


def test_cells_hold_the_characters_that_are_asked_for():
    read = [(d, t) for d in drawn("test") for t in d.turns if t.kind == "read"]
    same = [characters(d) == sorted(t.answer.replace(" ", "")) for d, t in read]
    assert len(read) > 50 and np.mean(same) > 0.85  # a cell names three characters at most
    for drawing, turn in read:
        assert set(characters(drawing)) <= set(turn.answer)
        assert all(0 <= r < 7 and 0 <= c < 7 for r, c in drawing.cells)


def test_letters_are_dark_or_light_where_the_cells_say():
    for drawing in drawn("train", "easy", 40):
        gray = np.asarray(drawing.image.convert("L")).astype(int)
        for row, column in drawing.cells:
            cell = gray[max(16 * row - 6, 0) : 16 * row + 22, 16 * column : 16 * column + 16]
            assert cell.max() - cell.min() > 50


def test_training_and_validation_never_show_what_is_reserved():
    groups = ("words", "names", "goods", "signs")
    kept = {w.lower() for group in groups for w in words(group) if reserved("word", w)}
    assert len(kept) > 100
    for split, level in (("train", "easy"), ("train", "full"), ("validation", "full")):
        turns = [turn for drawing in drawn(split, level) for turn in drawing.turns]
        assert not any(turn.held_out for turn in turns)
        shown = {w.lower() for t in turns if t.kind == "read" for w in t.answer.split()}
        assert len(shown) > 100 and not shown & kept


def test_a_test_asks_about_both():
    turns = [turn for drawing in drawn("test") for turn in drawing.turns]
    held = [turn.held_out for turn in turns if turn.kind not in ABOUT]
    assert 0.25 < np.mean(held) < 0.75


def test_a_reserved_price_holds_out_its_questions_and_no_others():
    rng = np.random.default_rng(0)
    written = next(t for t in (tag(rng, "test", 2) for _ in range(99)) if t.held == [t.lines[1]])
    held = {turn.kind for turn in questions(rng, written) if turn.held_out}
    asked = {turn.kind for turn in questions(rng, written) if not turn.held_out}
    assert held == {"read", "price", "line"} and {"thing", "word", "count", "letter"} <= asked


def test_answers_by_hand():
    rng = np.random.default_rng(0)
    written = tag(rng, "train", 2)
    thing, price = written.lines
    answers = {(turn.kind, turn.answer) for turn in questions(rng, written)}
    assert {("price", price), ("thing", thing), ("read", f"{thing} {price}")} <= answers
    assert {("count", str(len(thing))), ("letter", thing[0]), ("letter", thing[-1])} <= answers


def test_answers_about_the_writing_by_hand():
    rng = np.random.default_rng(0)
    shoes = Text("price tag", ["Shoes", "$20.80"], [], {"price": "$20.80", "thing": "Shoes"})
    answers = {turn.kind: turn.answer for turn in about(rng, shoes, ["script", "print"])}
    surface = {"kind": "price", "surface": "price tag"}
    assert answers == surface | {"hand": "handwritten", "digits": "4"}
    mixed = about(rng, Text("paper", ["north"], []), ["sans", "script"])
    assert {t.kind: t.answer for t in mixed} == {"kind": "word", "surface": "paper"}


def test_experts_read_lines_in_rows_of_cells_that_are_not_neighbours():
    for seed in range(50):
        styles = [("sans", 12), ("serif", 17), ("print", 11)][: 1 + seed % 3]
        top = 24 if len(styles) < 3 else 8
        baselines = in_rows(np.random.default_rng(seed), styles, top)
        middles = [y - height / 2 for y, (_, height) in zip(baselines, styles, strict=True)]
        rows = [int(middle // 16) for middle in middles]
        assert all(abs(m - 16 * r - 8) <= 2.5 for m, r in zip(middles, rows, strict=True))
        assert top <= middles[0] - 8 and middles[-1] < 96 and (np.diff(rows) >= 2).all()


def test_levels_keep_kinds_for_the_experts():
    kinds = {level: {t.kind for d in drawn("train", level) for t in d.turns} for level in LEVELS}
    assert kinds["medium"] < kinds["easy"] < kinds["full"]
    assert set(ABOUT) <= kinds["full"] - kinds["easy"]
    assert {"price", "date", "count", "letter"} <= kinds["full"] - kinds["medium"]


@pytest.mark.parametrize("face", [*FACES, *HANDS])
def test_every_face_has_every_character(face):
    for character in "AZaz09$.:":
        assert advances(character, face, 14)[-1] > 2
