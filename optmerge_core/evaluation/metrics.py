"""Metrics: how a task's answers are scored; and accuracies from answers.

The tasks' metrics are those of the paper's benchmarks: exact match (VQA, Geometry, OCR), relaxed
accuracy (Chart, as ChartQA has it) and IoU of boxes (Grounding, as RefCOCO has it).
"""

import re
from dataclasses import dataclass

import pandas as pd

ARTICLE = re.compile(r"^(?:an?|the) (?=\S)")
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)")
UNIT = 1000  # of a box's numbers, where the questions have no column box_unit: thousandths
LOCATIONS = 14  # location tokens, <loc0> … <loc14>, count fourteenths of the picture
BOX_START = ("<loc", "[")


def normalised(text):
    """Lower case, single spaces, no quotes, units (% and degrees) or full stop around it.

    An article before it goes too: "A cat." is "cat".
    """
    return ARTICLE.sub("", " ".join(text.lower().split()).strip(" .\"'`*%°"))


def found_box(text, unit=UNIT):
    """The box in an answer, as shares of width and height: its last four numbers over `unit`.

    None where there are fewer. Location tokens count in their own unit.
    """
    tokens = re.findall(r"<loc(\d+)>", text)
    numbers, unit = (tokens, LOCATIONS) if tokens else (NUMBER.findall(text), unit)
    return [float(n) / unit for n in numbers[-4:]] if len(numbers) >= 4 else None


def box_iou(first, second):
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    overlap = max(width, 0) * max(height, 0)
    areas = [max(b[2] - b[0], 0) * max(b[3] - b[1], 0) for b in (first, second)]
    return overlap / (sum(areas) - overlap) if sum(areas) > overlap else 0.0


def exact(prediction, answer):
    return prediction == answer


def relaxed(prediction, answer):
    """Within 5 % where the answer is a number, else exact match."""
    if not (NUMBER.fullmatch(prediction) and NUMBER.fullmatch(answer)):
        return prediction == answer
    return abs(float(prediction) - float(answer)) <= 0.05 * float(answer)


@dataclass(frozen=True)
class Box:
    """IoU >= 0.5, in whatever form the boxes are written; numbers in both count in one unit."""

    unit: int = UNIT

    def __call__(self, prediction, answer):
        boxes = found_box(prediction, self.unit), found_box(answer, self.unit)
        return None not in boxes and box_iou(*boxes) >= 0.5


METRICS = {
    "VQA": exact,
    "Geometry": exact,
    "Chart": relaxed,
    "OCR": exact,
    "Grounding": Box(),
    "OCR+Grounding": Box(),
}
"""Task -> metric(prediction, answer) -> whether it is right."""
NAMES = {"exact": exact, "relaxed": relaxed, "box": Box()}
"""What the column `metric` of a user's own questions may say."""


def metric_of(sample):
    """The metric of a question, a mapping with task and answer, and metric where the data has it.

    A question without an answer has one too: it says in what form an answer is asked for.

    The name in its column `metric` (a key of NAMES) decides, else its task's entry in METRICS. Of
    any other task, a box in brackets or location tokens is scored as a box, all else by exact
    match. A box's numbers count in the unit that its column `box_unit` gives, by default UNIT.
    Raises `ValueError` for an unknown name, and for a box metric of an answer that is none.
    """
    task, answer = sample["task"], sample.get("answer")
    name, unit = (None if pd.isna(v) else v for v in map(sample.get, ("metric", "box_unit")))
    if name and name not in NAMES:
        raise ValueError(f"{task}: metric {name!r} is unknown; give one of {', '.join(NAMES)}")
    default = Box() if (answer or "").startswith(BOX_START) else exact
    metric = NAMES[name] if name else METRICS.get(task, default)
    if not isinstance(metric, Box):
        return metric
    if answer is not None and found_box(answer) is None:
        raise ValueError(
            f"{task}: the answer {answer!r} is no box; name another metric ({', '.join(NAMES)}) "
            "in the column metric of its questions"
        )
    return Box(int(unit or UNIT))


def is_correct(metric, prediction, answer):
    """A model's answer in its own words: case, units, quotes and an article count not."""
    if isinstance(metric, Box):
        return metric(prediction, answer)
    return metric(normalised(prediction), normalised(answer))


def accuracy(answers, tasks=None):
    """Accuracy per task and their average, in per cent: a Series indexed by task, then Avg.

    tasks: their order, by default that of the answers.
    """
    scores = 100 * answers.groupby("task")["correct"].mean()
    scores = scores.reindex(answers["task"].unique() if tasks is None else tasks)
    return pd.concat([scores, pd.Series({"Avg": scores.mean()})])
