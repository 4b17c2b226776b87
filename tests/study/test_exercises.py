"""The exercises' checks: the solutions' answers are right, others get hints that give none away."""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml

from optmerge_core import load_recipe
from optmerge_core.checkpoints.names import module_kind
from optmerge_core.methods.interference import interference
from optmerge_core.methods.svd import singular_values
from optmerge_core.study import exercises
from optmerge_core.study.exercises import PAGE, check_exercise, hash_of
from optmerge_core.study.open import open_study
from optmerge_core.task_vectors.spectra import entropy_rank
from optmerge_core.task_vectors.tables import layer_norms

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = {(e["notebook"], e["exercise"]): e for e in yaml.safe_load((ROOT / PAGE).read_text())}


@pytest.fixture(autouse=True)
def no_tries_yet():
    exercises.TRIES.clear()


def saved(cell: str) -> str:
    """The saved output of a cell of the solutions, by its id."""
    notebook = nbformat.read(ROOT / f"notebooks/exercises/{cell[:2]}_solutions.ipynb", 4)
    (found,) = [other for other in notebook.cells if other.id == cell]
    outputs = [output.get("text") or output.data["text/plain"] for output in found.outputs]
    return "\n".join(outputs)


def column(text: str, number: int = -1) -> pd.Series:
    """A column of a printed table, by the row's name (its last word)."""
    rows = [line.split() for line in text.splitlines()]
    rows = [row for row in rows if len(row) > 1 and re.fullmatch(r"[-+\d.]+", row[number])]
    words = [[word for word in row if not re.fullmatch(r"[-+]?[\d.]+", word)] for row in rows]
    names = [" ".join(word) or row[0] for word, row in zip(words, rows, strict=True)]
    return pd.Series([float(row[number]) for row in rows], names)


def online_gain() -> float:
    average = column(saved("04-11"))
    return average["optmerge"] - average["weight_average"]


def left_out() -> tuple[str, str]:
    header, _, *lines = saved("05-15").splitlines()
    table = pd.DataFrame([line.split()[1:] for line in lines], [line.split()[0] for line in lines])
    return table.set_axis(header.split(), axis=1).astype(float).stack().idxmax()


def two_of_three() -> float:
    values = re.search(r"optmerge +([\d.]+) +([\d.]+)", saved("04-05")).groups()
    return float(values[0]) - float(values[1])


UNDECIDED = "undecided  the interval contains 0"
SOLUTIONS_06 = ROOT / "notebooks/exercises/06_solutions.ipynb"
SAVED = {
    (0, 1): lambda: column(saved("00-07")).idxmin(),
    (0, 2): lambda: column(saved("00-09")).idxmin().removeprefix("task kind "),
    (1, 3): lambda: float(re.search(r"OCR +([\d.]+)", saved("01-13"))[1]),
    (1, 4): lambda: re.findall(r"strong: (problem|warning)", saved("01-15"))[:2],
    (2, 2): lambda: column(saved("02-09"))["trailing half"],
    (2, 3): lambda: 0 if "[+0.0, +0.0]" in saved("02-13") else None,
    (3, 2): lambda: column(saved("03-07")).idxmin(),
    (3, 3): lambda: 0.1 if "0.1         65.0  92.0" in saved("03-11") else None,
    (4, 1): two_of_three,
    (4, 2): lambda: float(re.search(r"(\d+) % follow", saved("04-08"))[1]),
    (4, 3): online_gain,
    (5, 2): lambda: column(saved("05-11")).idxmax(),
    (5, 3): left_out,
    (6, 1): lambda: int(column(saved("06-07")).drop("0").idxmin()),
    (6, 2): lambda: column(saved("06-11").replace(UNDECIDED, ""), 1).idxmax(),
    (6, 3): lambda: re.search(r"Only the (\w+)", SOLUTIONS_06.read_text())[1],
    (7, 1): lambda: column(saved("07-03"), 1).idxmax(),
    (7, 2): lambda: float(re.search(r"worth ([\d.]+)", saved("07-05"))[1]),
    (7, 3): lambda: float(re.match(r"[\d.]+", saved("07-07"))[0]),
    (8, 1): lambda: column(saved("08-03"))["internvl"],
    (8, 2): lambda: float(re.search(r": ([\d.]+)", saved("08-05"))[1]),
    (8, 3): lambda: column(saved("08-07"))["OptMerge beats the paper's other methods"],
}  # fmt: skip
"""Of those that take a model's answers: what the solutions' saved outputs say."""


@pytest.mark.parametrize("number", SAVED, ids=lambda n: f"{n[0]:02}-{n[1]}")
def test_what_the_solutions_saved_is_right(number):
    assert check_exercise(*number, SAVED[number]())


def test_the_most_frequent_answer():
    folder = ROOT / "data/benchmark/questions/validation"
    tables = [pd.read_parquet(path).assign(task=path.stem) for path in folder.glob("*.parquet")]
    rows = pd.concat(tables)
    most = rows.groupby(["task", "kind"])["answer"].agg(lambda a: a.value_counts().iloc[0])
    assert check_exercise(0, 3, 100 * most.sum() / len(rows))
    assert not check_exercise(0, 3, 100 * most.sum() / len(rows) + 2)


@pytest.fixture(scope="module")
def task_vectors():
    recipes = ("internvl", "internvl_stressed")
    opened = [open_study(load_recipe(ROOT / f"data/recipes/{name}.yaml")) for name in recipes]
    return [study.task_vectors() for study in opened]


def test_task_vectors(task_vectors):
    norms = layer_norms(task_vectors[0])
    most = norms.loc[norms["relative_norm"].idxmax()]
    assert check_exercise(1, 1, (most["parameter"], most["expert"]))
    assert not check_exercise(1, 1, (most["expert"], most["parameter"]))
    stack = torch.cat([task_vectors[1][n].flatten(1) for n in task_vectors[1]], 1).double()
    length, orthogonal = stack.sum(0).norm(), stack.norm(dim=1).square().sum().sqrt()
    assert check_exercise(1, 2, length / orthogonal)
    assert "parallel" in check_exercise(1, 2, length / stack.norm(dim=1).sum()).text


def test_effective_ranks(task_vectors):
    stacks = {n: task_vectors[0][n] for n in task_vectors[0]}
    ranks = {n: entropy_rank(singular_values(stack)).mean().item() for n, stack in stacks.items()}
    shares = {n: rank / min(stacks[n].shape[1:]) for n, rank in ranks.items()}
    assert check_exercise(2, 1, pd.Series(shares).groupby(module_kind).mean().idxmin())
    plain = pd.Series(ranks).groupby(module_kind).mean().idxmin()
    assert "Compare shares" in check_exercise(2, 1, plain).text


def test_the_exact_minimum():
    tau = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    form = interference(tau, tau, tau)
    exact = (form.D @ torch.linalg.pinv(form.C)).norm()
    assert check_exercise(3, 1, exact) and check_exercise(3, 1, f"{exact:.2f}")
    assert "further" in check_exercise(3, 1, 7.58).text
    assert "starts" in check_exercise(3, 1, tau.sum(0).norm()).text


def test_no_sub_task_is_answered_better_than_by_the_expert():
    rows = pd.read_parquet(ROOT / "figures/internvl/predictions.parquet")
    own = rows[rows["model"] == "Individual " + rows["task"]]
    ours = rows[rows["model"] == "OptMerge"]
    expert, merged = (r.groupby(["task", "kind"])["correct"].mean() for r in (own, ours))
    better = (merged > expert).sum()
    assert check_exercise(5, 1, better) and not check_exercise(5, 1, better + 1)


def test_every_exercise_of_every_notebook_has_a_check():
    there = set()
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        last = nbformat.read(path, 4).cells[-1].source.split("## Exercises")[1]
        numbers = re.findall(r"^(\d+)\. ", last, flags=re.MULTILINE)
        there |= {(int(path.name[:2]), int(number)) for number in numbers}
        assert "check_exercise(" in last, path.name
    assert there == set(ENTRIES) and len(there) > 20
    recomputed = {(0, 3), (1, 1), (1, 2), (2, 1), (3, 1), (5, 1)}
    assert there == set(SAVED) | recomputed


@pytest.mark.parametrize("number", ENTRIES, ids=lambda n: f"{n[0]:02}-{n[1]}")
def test_a_wrong_answer_gets_hint_after_hint_and_none_says_the_answer(number):
    entry = ENTRIES[number]
    step, words = entry.get("step"), entry.get("words", 1)
    wrong = 12345.0 if step else ["nothing of the kind"] * words
    said = [check_exercise(*number, wrong) for _ in range(len(entry["hints"]) + 1)]
    assert not any(said) and len(entry["hints"]) >= 2
    for check, hint in zip(said, [*entry["hints"], entry["hints"][-1]], strict=True):
        assert hint in check.text and entry["good"] not in check.text
    assert "solutions" in said[-1].text and "solutions" not in said[0].text
    texts = [*entry["hints"], *(near["hint"] for near in entry.get("near", []))]
    texts += [] if number == (3, 3) else [entry["asks"]]  # which names the ratios to try
    tokens = {token for text in texts for token in re.findall(r"[\w.]+", text)}
    for token in {part for t in tokens for part in (t, t.strip("."))} if words == 1 else ():
        try:
            assert hash_of(*number, token, step) not in entry["right"], token
        except ValueError:
            continue  # no number


def test_the_form_of_an_answer():
    assert check_exercise(3, 2, " SubSpace ") and check_exercise(3, 2, ["subspace"])
    asked = check_exercise(3, 1)
    assert not asked and "a number" in repr(asked) and "norm" in repr(asked)
    for answer in ("long", float("nan"), [9.0, 9.0], float("inf")):
        assert "takes a number" in check_exercise(3, 1, answer).text
    assert "2 words in a list" in check_exercise(1, 1, "OCR").text
    assert not exercises.TRIES
    with pytest.raises(ValueError, match="exercise 9: notebook 3 has 1 to 3"):
        check_exercise(3, 9, 1)
    with pytest.raises(ValueError, match="notebook 70: there are 0 to 8"):
        check_exercise(70, 1)
