"""Folders of questions: which tasks they have, and their samples."""

from pathlib import Path

from optmerge_core.errors import extra
from optmerge_core.evaluation.metrics import METRICS

with extra("datasets"):
    import numpy as np
    import PIL.Image
    import pyarrow.parquet as pq
    from datasets import Dataset, Image, concatenate_datasets
    from datasets.table import InMemoryTable


def tasks_of(folder):
    """The tasks that a folder of questions has, `<folder>/validation/<task>.parquet`.

    Those that METRICS knows first, in its order. Raises `ValueError` if there is none.
    """
    found = {path.stem for path in Path(folder or "", "validation").glob("*.parquet")}
    if not folder or not found:
        raise ValueError(
            f"evaluation.data {folder!r}: a recipe needs a folder with <split>/<task>.parquet in "
            "validation and test (columns image, question, answer), as data/benchmark/questions is"
        )
    return [*(t for t in METRICS if t in found), *sorted(found - set(METRICS))]


def load_split(folder, split, count=None, tasks=None):
    """The questions of a split as one `datasets.Dataset`, `count` per task (None: all).

    tasks: their names, by default all that the folder has. Columns: image, question, answer, kind,
    task; a file without the last two gets its own name for them. A column metric may say how
    answers are scored, box_unit what the numbers of boxes count (`metrics.metric_of`).
    """
    parts = []
    for task in tasks_of(folder) if tasks is None else tasks:
        path = Path(folder, split, f"{task}.parquet")
        data = _read(path, ("image", "question", "answer"))
        if count is not None:
            if count > len(data):
                raise ValueError(
                    f"{path} has {len(data)} samples, not {count}: say how many in the recipe's "
                    f"evaluation.{split}_samples"
                )
            data = data.select(range(count))
        parts.append(_of_task(data, task))
    return concatenate_datasets(parts)


def load_unlabelled(folder, tasks, count, draw=None):
    """Pictures and questions of tasks as one `datasets.Dataset`, `count` of each, without answers.

    `<folder>/<task>.parquet` has columns image, question, and metric and box_unit where the form of
    an answer is not its task's; no other column is read, be there answers or not. They are the
    file's first, or with a number `draw` the first of that draw: of two counts the smaller one's
    are among the larger one's. Raises `ValueError` for files that are missing or have fewer.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"samples {count!r}: give a whole number from 1, of each task")
    parts, paths = [], [Path(folder or "", f"{task}.parquet") for task in tasks]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(
            f"{folder}: {', '.join(missing)} is missing; each expert's own pictures and questions "
            "are in the file that is named after it (columns image, question)"
        )
    for number, (task, path) in enumerate(zip(tasks, paths, strict=True)):
        data = _read(path, ("image", "question"), ("metric", "box_unit"))
        if count > len(data):
            raise ValueError(f"{path} has {len(data)} samples, not {count}: ask for fewer")
        parts.append(_of_task(data.select(drawn(len(data), count, draw, number)), task))
    return concatenate_datasets(parts)


def drawn(size, count, draw, number):
    """Rows of the file of a task, its number among others: see `load_unlabelled`."""
    order = np.arange(size)
    if draw is not None:
        order = np.random.default_rng([draw, number]).permutation(order)
    return order[:count]


def _read(path, needed, others=None):
    """A file of questions, all of its columns or those that are needed and `others`."""
    found = pq.read_schema(path).names
    if missing := set(needed) - set(found):
        *first, last = needed
        raise ValueError(
            f"{path} has no column {', '.join(sorted(missing))} (found {', '.join(found)}); name "
            f"them {', '.join(first)} and {last}"
        )
    columns = None if others is None else [x for x in (*needed, *others) if x in found]
    data = Dataset(InMemoryTable(pq.read_table(path, columns=columns)))
    if getattr(data.features["image"], "dtype", "") in ("string", "large_string"):
        raise ValueError(
            f"{path}: column image has texts, such as file names; store the encoded images "
            "themselves, as bytes"
        )
    return data


def _of_task(data, task):
    """The same with columns kind and task, of the task's name where the file has none."""
    for column in ("kind", "task"):
        if column not in data.column_names:
            data = data.add_column(column, [task] * len(data))
    return data.cast_column("image", Image())


def blanked(data):
    """The same questions about grey pictures of the same sizes: what words alone answer."""
    kind, sizes = Image(), [picture.size for picture in data["image"]]
    greys = [kind.encode_example(PIL.Image.new("RGB", size, (128, 128, 128))) for size in sizes]
    return data.remove_columns("image").add_column("image", greys, feature=kind)


def own_tasks(study):
    """Expert -> the tasks that it is asked as its own: the one of its name, or else all."""
    tasks = tasks_of(study.evaluation.data)
    return {name: [name] if name in tasks else tasks for name in study.experts}
