"""Folders of questions: which tasks they have, and their samples."""

from pathlib import Path

from optmerge_core.errors import extra
from optmerge_core.evaluation.metrics import METRICS

with extra("datasets"):
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
        data = Dataset(InMemoryTable(pq.read_table(path)))
        if missing := {"image", "question", "answer"} - set(data.column_names):
            raise ValueError(
                f"{path} has no column {', '.join(sorted(missing))} (found "
                f"{', '.join(data.column_names)}); name them image, question and answer"
            )
        if getattr(data.features["image"], "dtype", "") in ("string", "large_string"):
            raise ValueError(
                f"{path}: column image has texts, such as file names; store the encoded images "
                "themselves, as bytes"
            )
        if count is not None:
            if count > len(data):
                raise ValueError(
                    f"{path} has {len(data)} samples, not {count}: say how many in the recipe's "
                    f"evaluation.{split}_samples"
                )
            data = data.select(range(count))
        for column in ("kind", "task"):
            if column not in data.column_names:
                data = data.add_column(column, [task] * len(data))
        parts.append(data.cast_column("image", Image()))
    return concatenate_datasets(parts)


def blanked(data):
    """The same questions about grey pictures of the same sizes: what words alone answer."""
    kind, sizes = Image(), [picture.size for picture in data["image"]]
    greys = [kind.encode_example(PIL.Image.new("RGB", size, (128, 128, 128))) for size in sizes]
    return data.remove_columns("image").add_column("image", greys, feature=kind)


def own_tasks(study):
    """Expert -> the tasks that it is asked as its own: the one of its name, or else all."""
    tasks = tasks_of(study.evaluation.data)
    return {name: [name] if name in tasks else tasks for name in study.experts}
