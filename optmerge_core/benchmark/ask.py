"""Ask the merged model: a picture, picked or drawn, a question, and everyone's answer to it."""

import numpy as np

from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.benchmark.play import Play, answers_table, figure_of, menu
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.benchmark.tasks.scenes import (
    COLORS,
    IMAGE_SIZE,
    SHAPES,
    Shape,
    draw_shape,
    font,
)
from optmerge_core.errors import extra
from optmerge_core.evaluation.questions import load_split
from optmerge_core.study.open import open_study

with extra("datasets"):
    import datasets
    from PIL import Image, ImageDraw

with extra("notebooks"):
    import ipywidgets

PICTURES = 20  # of each task, to pick from


def drawing(text):
    """A picture of what a text names: `red circle 8 8 20; text AB3 30 34`, in pixels of 56.

    A thing is colour, shape, left, top, size; `text` a word, left, top. Later ones lie above.
    Raises `ValueError` that says what cannot be read.
    """
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (248, 248, 248))
    canvas = ImageDraw.Draw(image)
    for part in filter(None, (piece.split() for piece in text.split(";"))):
        words, numbers = part[:2], part[2:]
        if not all(number.isdigit() and int(number) <= IMAGE_SIZE for number in numbers):
            raise ValueError(f"{' '.join(part)!r}: places are whole pixels from 0 to {IMAGE_SIZE}")
        places = list(map(int, numbers))
        if words[0] == "text" and len(part) == 4:
            canvas.text(places, words[1], (20, 20, 20), font(11))
        elif words[0] in COLORS and words[-1] in SHAPES and len(part) == 5:
            left, top, size = places
            box = (left, top, left + size, top + size)
            draw_shape(canvas, Shape(*words, box), COLORS[words[0]])
        else:
            raise ValueError(
                f"{' '.join(part)!r}: write COLOUR SHAPE LEFT TOP SIZE, or text WORD LEFT TOP; "
                f"colours: {', '.join(COLORS)}; shapes: {', '.join(SHAPES)}"
            )
    return image


class Asked:
    """Base, experts and merged model of an embedded study, to be asked one question at a time."""

    def __init__(self, study):
        opened = open_study(study)
        self.data = load_split(study.evaluation.data, "validation", PICTURES)
        self.evaluator = evaluator_for(study.base_model, self.data.select([0]))
        held = {n: opened.base[n] for n in opened.names}
        merged, scaling = opened.merge_tensors(), study.scaling_coefficient
        self.models = {"Base model": held}
        for name, expert in opened.experts.items():
            self.models[f"Expert {name}"] = {n: expert[n] for n in opened.names}
        self.models["Merged model"] = {n: held[n] + scaling * merged[n] for n in opened.names}

    def row(self, task, number):
        """A stored sample: image, question, answer, … of a task's `number`-th picture."""
        return self.data[list(TASKS).index(task) * PICTURES + number]

    def answers(self, image, question, answer=None, task="VQA"):
        """[{who, answer, right}]; raises `ValueError` for words that the models do not know."""
        tokenizer = self.evaluator.tokenizer
        unknown = [
            word for word in question.split()
            if tokenizer.unk_token_id in tokenizer(f" {word}")["input_ids"]
        ]  # fmt: skip
        if unknown or not question.strip():
            text = f"unknown words: {', '.join(unknown)}" if unknown else "type a question"
            raise ValueError(f"{text}; the models know the words of their tasks alone, as in "
                             "'what color is the circle ?' or 'read the text'")  # fmt: skip
        kind = task if answer is not None else "VQA"
        row = {"image": image, "question": question, "answer": answer or "", "task": kind}
        asked = datasets.Dataset.from_list([row | {"kind": "typed"}])
        one = self.evaluator.asking(asked.cast_column("image", datasets.Image()))
        said = {who: one.answer(weights).iloc[0] for who, weights in self.models.items()}
        return [
            {"who": who, "answer": found["prediction"], "right": bool(found["correct"])}
            for who, found in said.items()
        ]


def ask(study):
    """The widget: pick a picture or draw one, type a question or leave it, read all answers."""
    asked = Asked(study)

    def draw(task, number, drawn, question):
        row = asked.row(task, number)
        own = not drawn.strip() and question.strip() in ("", row["question"])
        image = drawing(drawn) if drawn.strip() else row["image"]
        text = row["question"] if own else question.strip()
        rows = asked.answers(image, text, row["answer"] if own else None, task)
        figure, (left, right) = figure_of(2, 8)
        left.imshow(np.asarray(image))
        left.axis("off")
        answers_table(right, rows)
        right.set_title(f"(right: {row['answer']}; in bold who says so)" if own else "", fontsize=9)
        figure.suptitle(text)
        return figure

    typed = {"continuous_update": False, "layout": {"width": "32em"}}
    return Play(
        draw,
        task=menu("picture of", list(TASKS)),
        number=ipywidgets.IntSlider(description="number", max=PICTURES - 1),
        drawn=ipywidgets.Text(
            description="or draw", placeholder="red circle 8 8 20; text AB3 30 34", **typed
        ),
        question=ipywidgets.Text(
            description="question", placeholder="empty: the picture's own", **typed
        ),
    )
