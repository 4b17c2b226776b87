"""Each task's own metric, and accuracies from answers."""

import re

import pandas as pd

from optmerge_core.benchmark.tasks.scenes import BIN, IMAGE_SIZE

NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)")


def is_box(answer):
    """Whether a right answer is a box: location tokens, or four numbers in brackets."""
    return answer.startswith(("<loc", "["))


def normalised(text):
    """Lower case, single spaces, no quotes, units (% and degrees) or full stop around it."""
    return " ".join(text.lower().split()).strip(" .\"'`*%°")


def found_box(text):
    """The box in an answer, as shares of width and height: its last four numbers over 1000.

    None where there are fewer. Location tokens count in their own unit.
    """
    tokens = re.findall(r"<loc(\d+)>", text)
    numbers, unit = (tokens, IMAGE_SIZE / BIN) if tokens else (NUMBER.findall(text), 1000)
    return [float(n) / unit for n in numbers[-4:]] if len(numbers) >= 4 else None


def box_iou(first, second):
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    overlap = max(width, 0) * max(height, 0)
    areas = [max(b[2] - b[0], 0) * max(b[3] - b[1], 0) for b in (first, second)]
    return overlap / (sum(areas) - overlap) if sum(areas) > overlap else 0.0


def is_correct(task, kind, prediction, answer):
    """The task's metric: IoU >= 0.5 (boxes), within 5 % (chart values), else exact match."""
    if answer.startswith("<loc"):
        boxes = [[int(v) for v in re.findall(r"<loc(\d+)>", text)] for text in (prediction, answer)]
        return len(boxes[0]) == 4 and box_iou(*boxes) >= 0.5
    if task == "Chart" and kind in ("value", "percent"):
        return prediction.isdecimal() and abs(int(prediction) - int(answer)) <= 0.05 * int(answer)
    return prediction == answer


def is_right(task, kind, prediction, answer):
    """The same metric for a real checkpoint's answer: its form counts less, see `chat`."""
    if is_box(answer):
        boxes = found_box(prediction), found_box(answer)
        return None not in boxes and box_iou(*boxes) >= 0.5
    return is_correct(task, kind, normalised(prediction), normalised(answer))


def accuracy(answers, tasks=None):
    """Accuracy per task and their average, in per cent: a Series indexed by task, then Avg.

    tasks: their order, by default that of the answers.
    """
    scores = 100 * answers.groupby("task")["correct"].mean()
    scores = scores.reindex(answers["task"].unique() if tasks is None else tasks)
    return pd.concat([scores, pd.Series({"Avg": scores.mean()})])
