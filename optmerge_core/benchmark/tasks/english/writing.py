"""Writing: words, names, prices, dates and numbers in many faces on many grounds (OCR).

Level `easy` shows one or two large lines on plain paper; `medium` up to three smaller ones on
signs, tags, notes, gradients and noise, and asks to read only; `full`, what experts learn and tests
ask, such lines in rows of the picture's cells, and asks about the writing too (ABOUT). A `page` is
full of small text that nobody asks about: what a tower learns its letters from.
"""

from dataclasses import dataclass, field, replace
from string import ascii_letters, ascii_lowercase, ascii_uppercase, digits

from optmerge_core.benchmark.tasks.english.drawing import (
    CELL,
    IMAGE_SIZE,
    Drawing,
    Turn,
    reserved,
)
from optmerge_core.benchmark.tasks.english.lettering import (
    FACES,
    HANDS,
    advances,
    allowed,
    words,
    write,
)
from optmerge_core.benchmark.tasks.english.surfaces import draw_text, ground
from optmerge_core.benchmark.tasks.scenes import choice, converse

ORDINALS = ("first", "second", "third")
ASK = {
    "caption": (
        "Describe everything in the picture.",
        "What is in the picture?",
        "Describe the picture in one sentence.",
    ),
    "read": (
        "What does it say?",
        "Read the text.",
        "What is written here?",
        "What text is in the picture?",
    ),
    "word": (
        "What is the {nth} word?",
        "Read the {nth} word.",
        "Which word is the {nth} one?",
    ),
    "line": ("What is on the {nth} line?", "Read the {nth} line.", "What does line {n} say?"),
    "price": (
        "What is the price?",
        "How much does it cost?",
        "How much is it?",
        "What price is on the tag?",
    ),
    "thing": ("What is for sale?", "What can you buy here?", "What is the price tag for?"),
    "date": ("What is the date?", "Which day and month is it?", "What date is written here?"),
    "month": ("Which month is it?", "What month is written here?", "In which month is it?"),
    "year": ("Which year is it?", "What year is written here?", "In which year is it?"),
    "weekday": (
        "Which day of the week is it?",
        "What weekday is written here?",
        "On which weekday is it?",
    ),
    "name": (
        "What is the name?",
        "Whose name is written here?",
        "Which name is on the note?",
        "Which person is named?",
    ),
    "time": ("What time is it?", "What time is written here?", "At what time is it?"),
    "number": ("What is the number?", "Which number is written here?", "Read the number."),
    "count": (
        "How many letters does the {nth}word have?",
        "How many letters are in the {nth}word?",
        "Count the letters of the {nth}word.",
    ),
    "kind": (
        "Is it a price, a date, a time, a name, a number or a word?",
        "What kind of text is it?",
        "Does it say a price, a date, a time, a name, a number or a word?",
    ),
    "surface": (
        "What is the text written on?",
        "Is it on paper, a sign, a note or a price tag?",
        "On what is it written?",
    ),
    "hand": (
        "Is it printed or handwritten?",
        "Is the writing printed or handwritten?",
        "Was it printed or written by hand?",
    ),
    "digits": (
        "How many digits are there?",
        "How many digits do you see?",
        "Count the digits.",
    ),
    "words": (
        "How many words are there?",
        "How many words do you see?",
        "Count the words.",
    ),
    "letter": (
        "What is the {end} letter of the {nth}word?",
        "Which letter does the {nth}word {begin} with?",
        "With which letter does the {nth}word {begin}?",
    ),
}
ABOUT = "kind", "surface", "hand", "digits"
"""kinds of questions about the writing, which only `full` asks"""
PRACTISED = dict.fromkeys([kind for kind in ASK if kind not in ABOUT], 1.0)
WEIGHTS = {
    "easy": PRACTISED | {"read": 4, "word": 1.5, "price": 2, "name": 2, "date": 2},
    "medium": {"read": 3, "word": 2, "line": 2, "thing": 1, "name": 1},
    "full": dict.fromkeys(ASK, 1.0) | {"read": 3, "word": 1.5, "price": 3, "name": 2, "date": 2},
}


@dataclass(frozen=True)
class Text:
    """What is written: its lines, on which surface, what is reserved, and what it answers.

    held: the words, prices, dates or numbers in it that training never shows, as written.
    facts: kind of question -> answer.
    """

    surface: str
    lines: list[str]
    held: list[str]
    facts: dict[str, str] = field(default_factory=dict)


def styled(rng, word):
    """A word in small letters, with a capital, or in capitals; a name as it is."""
    if word[0].isupper():
        return word
    return choice(rng, (word, word.capitalize(), word, word.capitalize(), word.upper()))


def a_word(rng, split, group):
    """A word as it is written, and the list of it if it is reserved."""
    word = allowed(rng, split, lambda: choice(rng, group), "word")
    written = styled(rng, word)
    return written, [written] * reserved("word", word)


def plain(rng, split, count, groups=("words", "words", "names")):
    """Different words, one a line or two short ones on the first."""
    chosen = {}
    while len(chosen) < count:
        word, held = a_word(rng, split, words(choice(rng, groups)))
        chosen[word] = held
    lines = list(chosen)
    if count > 1 and len(lines[0] + lines[1]) <= 8 and rng.random() < 0.7:
        lines = [f"{lines[0]} {lines[1]}", *lines[2:]]
    return Text(choice(rng, ("paper", "paper", "sign", "note")), lines, sum(chosen.values(), []))


def sign(rng, split, count):
    return replace(plain(rng, split, min(count, 2), ("signs",)), surface="sign")


def tag(rng, split, count):
    def price():
        cents = choice(rng, ("", ".00", ".50", ".99", ".25", f".{int(rng.integers(10, 100))}"))
        return f"${int(rng.integers(1, 30 if cents else 100))}{cents}"

    cost = allowed(rng, split, price, "price")
    held = [cost] * reserved("price", cost)
    if count == 1:
        return Text("price tag", [cost], held, {"price": cost})
    thing, new = a_word(rng, split, words("goods"))
    return Text("price tag", [thing, cost], new + held, {"price": cost, "thing": thing})


def date(rng, split, count):
    def day():
        month = choice(rng, words("months"))
        short = month[:3] if rng.random() < 0.4 else month
        number = int(rng.integers(1, 29))
        return f"{number} {short}" if rng.random() < 0.6 else f"{short} {number}"

    when = allowed(rng, split, day, "date")
    facts, lines = {"date": when, "month": next(p for p in when.split() if p.isalpha())}, [when]
    if count > 1 and rng.random() < 0.6:
        facts["year"] = str(int(rng.integers(1950, 2030)))
        lines = [when, facts["year"]]
    if len(lines) < count:
        facts["weekday"] = choice(rng, words("days"))
        lines = [facts["weekday"], *lines]
    surface = choice(rng, ("paper", "sign", "note"))
    return Text(surface, lines, [when] * reserved("date", when), facts)


def note(rng, split, count):
    """A name, alone or after a word, as on a letter or a door."""
    name, held = a_word(rng, split, words("names"))
    start = choice(rng, ("Dear", "For", "To", "From", "Call", "Hello"))
    lines = {1: [name], 2: [start, name], 3: [f"{start} {name}"]}[count]
    if count == 3:
        word, new = a_word(rng, split, words("words"))
        lines, held = [*lines, word], held + new
    return Text("note", lines, held, {"name": name})


def number(rng, split, count):
    def figures():
        if kind == "number":
            return str(int(10 ** rng.uniform(0.3, 3)))
        return f"{int(rng.integers(1, 24))}:{int(rng.integers(12)) * 5:02d}"

    kind = choice(rng, ("number", "time"))
    value = allowed(rng, split, figures, kind)
    names = {"number": ("room", "bus", "page", "gate", "line"), "time": ("open", "train", "bus")}
    lines = [value] if count == 1 else [a_word(rng, "train", names[kind])[0], value]
    held = [value] * reserved(kind, value)
    return Text(choice(rng, ("paper", "sign")), lines, held, {kind: value})


def questions(rng, written):
    """All turns about a text; held out are those for which something reserved must be read."""

    def ask(kind, answer, about, **fields):
        held = any(f" {text} " in f" {about} " for text in written.held)
        return Turn(choice(rng, ASK[kind]).format(**fields), answer, kind, held_out=held)

    lines, all_of_it = written.lines, " ".join(written.lines)
    parts = all_of_it.split()
    yield ask("read", all_of_it, all_of_it)
    for kind, answer in written.facts.items():
        yield ask(kind, answer, answer)
    if len(lines) > 1:
        for i, line in enumerate(lines):
            yield ask("line", line, line, nth=ORDINALS[i], n=i + 1)
    if len(parts) > 1 and all_of_it.replace(" ", "").isalpha():
        yield ask("words", str(len(parts)), "")
    for i, part in enumerate(parts[:3]):
        if part.isalpha():
            nth = f"{ORDINALS[i]} " if len(parts) > 1 else ""
            if nth:
                last = i + 1 == len(parts) and rng.random() < 0.5
                yield ask("word", part, part, nth="last" if last else ORDINALS[i])
            yield ask("count", str(len(part)), part, nth=nth)
            for end, begin, letter in (("first", "begin", part[0]), ("last", "end", part[-1])):
                yield ask("letter", letter, part, nth=nth, end=end, begin=begin)


def about(rng, written, faces):
    """Turns about the writing itself; faces: of its lines."""

    def ask(kind, answer):
        return Turn(choice(rng, ASK[kind]), str(answer), kind)

    kinds = "price", "date", "time", "number", "name"
    yield ask("kind", next((kind for kind in kinds if kind in written.facts), "word"))
    yield ask("surface", written.surface)
    if len({face in HANDS for face in faces}) == 1:
        yield ask("hand", "handwritten" if faces[0] in HANDS else "printed")
    if figures := sum(map(str.isdigit, "".join(written.lines))):
        yield ask("digits", figures)


# ---------------------------------------------------------------- pictures


def page(rng, split):
    """A picture full of lines of one face, half of them words and numbers, half random letters."""
    image, ink, (left, right) = ground(rng, choice(rng, ("paper", "sign", "note")), False)
    face, height = choice(rng, (*FACES, *HANDS)), int(rng.integers(9, 18))
    height = max(height, 15 if face == "script" else 11 if face == "print" else 0)
    y, cells = int(rng.integers(4, 12)) + height, {}
    while y < IMAGE_SIZE - 4:
        line = scribble(rng, split)
        while advances(longer := f"{line} {scribble(rng, split)}", face, height)[-1] < right - left:
            line = longer
        while advances(line, face, height)[-1] > right - left:
            line = line[:-1]
        for character, cell in write(rng, image, line.strip(), face, height, (left, y), ink):
            cells.setdefault(cell, []).append(character)
        y += max(CELL, int(height * rng.uniform(1.5, 2)))  # one line a row of cells
    return Drawing(image, [], {cell: characters[:3] for cell, characters in cells.items()})


def scribble(rng, split):
    """A word, a price or a number that training may show, or random letters."""
    if rng.random() < 0.5:
        letters = choice(rng, (ascii_lowercase, ascii_uppercase, digits, ascii_letters + digits))
        return "".join(choice(rng, letters) for _ in range(int(rng.integers(2, 7))))
    makers = (plain, plain, plain, tag, date, number)
    return choice(rng, makers)(rng, "train" if split == "test" else split, 1).lines[0]


def some_text(rng, split, level):
    """A text of any kind, of one to three lines."""
    kinds = (plain, plain, plain, sign, tag, tag, date, note, note, number)
    if level == "full":
        kinds = (plain, plain, sign, tag, tag, date, date, note, number, number)
    counts = {"easy": (1, 1, 2), "caption": (1, 2, 3)}.get(level, (1, 2, 2, 2, 3, 3))
    return choice(rng, kinds)(rng, split, choice(rng, counts))


def ocr(rng, split, level):
    if level == "page":
        return page(rng, split)
    written = some_text(rng, split, level)
    image, cells, faces = draw_text(rng, written, level)
    if level == "caption":
        told = f"a {written.surface} that says {' '.join(written.lines)}"
        turns = [Turn(choice(rng, ASK["caption"]), told, "caption", held_out=bool(written.held))]
    else:
        turns = list(questions(rng, written))
        turns += about(rng, written, faces) if level == "full" else []
        turns = converse(rng, turns, WEIGHTS[level])
    return Drawing(image, turns, cells)
