"""Spoken questions about pictures: specialists, merges, online compositions, what is guessed.

`python -m optmerge_core.benchmark smol-omni-seeds RECIPE OUT` merges and evaluates the specialists
of every seed (the shipped seed's from the recipe, the others' from OUT/seed<n>, as
`smol-omni-train` leaves them) and writes OUT/spoken.csv (a row for who was given what),
OUT/leads.csv (over what can be guessed), OUT/kinds.csv and OUT/search.csv. A seed that is done is
not done again.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from tqdm.auto import tqdm

from optmerge_core.benchmark.experiments.omni_seeds import MERGES, weights_of
from optmerge_core.benchmark.experiments.spoken_evaluation import (
    GIVEN,
    SpokenEvaluator,
    by_kind,
    leads,
    spoken_table,
)
from optmerge_core.benchmark.tasks.spoken_questions import load
from optmerge_core.benchmark.training.build import SEEDS
from optmerge_core.evaluation.selection import best_scaling, search_scaling
from optmerge_core.omni import compose
from optmerge_core.omni.online import TEXT, online_weights, route
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import load_recipe

BOTH, WRITTEN, PICTURE, SPEECH = GIVEN
BALANCES = {"": (1.0, 1.0), ", more of vision": (1.4, 0.7), ", more of speech": (0.7, 1.4)}
"""What follows a method's name -> weights of the specialists' task vectors, in order."""
BASE = "base_model"


def floors(specialists):
    """What a composition has to beat, as (who, given): what is guessed, and one specialist alone.

    The question without the picture, the picture without the question, and everybody who never
    learnt to do both, given both.
    """
    alone = [(m, BOTH) for m in specialists]
    return [("merged", SPEECH), ("merged", PICTURE), (BASE, BOTH), *alone]


class Composed:
    """A seed's specialists in one model whose language model's weights change.

    opened: the study with them; questions: split -> rows; folder: for the composed model.
    """

    def __init__(self, opened, questions, folder):
        self.opened, self.questions, self.folder = opened, questions, folder
        self.names = opened.names
        self.start = {n: opened.base[n].float() for n in self.names}
        self.own = {m: {n: x[n].float() for n in self.names} for m, x in opened.experts.items()}
        self.merged = {}

    def task_vector(self, label):
        """A merged one, by a method and one of BALANCES after its name; the last is kept."""
        if label not in self.merged:
            method, comma, rest = label.partition(",")
            weights = BALANCES[comma + rest]
            experts = {
                m: {n: self.start[n] + w * (own[n] - self.start[n]) for n in self.names}
                for (m, own), w in zip(self.own.items(), weights, strict=True)
            }
            self.merged = {label: self.opened.merge_tensors(method, experts=experts)}
        return self.merged[label]

    def weights(self, label, scaling):
        merged = self.task_vector(label)
        return {n: self.start[n] + scaling * merged[n] for n in self.names}

    def evaluator(self, split, given=BOTH):
        return SpokenEvaluator(self.folder, self.questions[split], given)


def search(composed, scaling_coefficients):
    """Validation accuracy by method and scaling coefficient, then by BALANCES at the best of it."""
    asked = composed.evaluator("validation")

    def score(label, scaling):
        return by_kind(asked.answer(composed.weights(label, scaling)))["Avg"]

    table = search_scaling(score, MERGES, scaling_coefficients)
    rows = [
        (f"{method}{balance}", scaling, score(f"{method}{balance}", scaling))
        for method, scaling in best_scaling(table).items()
        for balance in BALANCES
        if balance
    ]
    return pd.concat([table, pd.DataFrame(rows, columns=table.columns)], ignore_index=True)


def best_of(table, method):
    """A method's label, with its balance, and scaling coefficient that validation likes best."""
    own = table[table["method"].str.partition(",")[0] == method]
    best = own.sort_values("accuracy", ascending=False, kind="stable").iloc[0]
    return best["method"], best["scaling_coefficient"]


def evaluate(composed, table, recipe_method, decoupled):
    """Test answers: (who, given) -> table. `merged` is the recipe's method, given less.

    decoupled: modality -> folder of the specialist trained for DAMC.
    """
    shipped = best_scaling(table)  # by the paper's one coefficient for both
    answers = {}
    both = composed.evaluator("test")
    answers[BASE, BOTH] = both.answer(composed.start)
    for modality, weights in composed.own.items():
        answers[modality, BOTH] = both.answer(weights)
    for method in tqdm(MERGES, desc="merges"):
        answers[method, BOTH] = both.answer(composed.weights(method, shipped[method]))
        label, scaling = best_of(table, method)
        if label != method:
            answers[f"{method}, one each", BOTH] = both.answer(composed.weights(label, scaling))
    route(both.model, online_weights(composed.own))
    answers["naive_mc", BOTH] = both.answer()
    if decoupled:
        features = {m: weights_of(path, composed.names) for m, path in decoupled.items()}
        text = {m: weights_of(Path(path, TEXT), composed.names) for m, path in decoupled.items()}
        route(both.model, online_weights(features, text))
        answers["damc", BOTH] = both.answer()
    del both
    chosen = composed.weights(recipe_method, shipped[recipe_method])
    for given in (WRITTEN, PICTURE, SPEECH):
        asked = composed.evaluator("test", given)
        answers["merged", given] = asked.answer(chosen)
        answers[BASE, given] = asked.answer(composed.start)
        for modality, weights in composed.own.items():
            answers[modality, given] = asked.answer(weights)
    return answers


def of_seed(study, seed, output):
    """The study's specialists and decoupled ones, modality -> folder: the recipe's, or a seed's."""
    if seed == SEEDS[0]:
        return study.experts, study.evaluation.references
    folder = Path(output, f"seed{seed}")
    return (
        {m: str(folder / m) for m in study.experts},
        {m: str(folder / "decoupled" / m) for m in study.evaluation.references},
    )


def main(recipe, output, seeds=SEEDS):
    study, tables = load_recipe(recipe), {}
    size = study.evaluation
    counts = {"validation": size.validation_samples, "test": size.test_samples}
    questions = {split: load(size.data, split, count) for split, count in counts.items()}
    for seed in tqdm(seeds, desc="seeds"):
        place = Path(output, "scores", str(seed))
        if not (place / "spoken.csv").exists():
            specialists, decoupled = of_seed(study, seed, output)
            opened = open_study(study, experts=specialists)
            with TemporaryDirectory() as folder:
                compose(
                    study.base_model, specialists, Path(folder, "omni"), method="weight_average"
                )
                composed = Composed(opened, questions, Path(folder, "omni"))
                table = search(composed, study.scaling_coefficients)
                answers = evaluate(composed, table, study.merge_method, decoupled)
            write(place, table, answers, floors(specialists))
        for name in ("search", "kinds", "leads", "spoken"):
            tables.setdefault(name, {})[seed] = pd.read_csv(place / f"{name}.csv")
    for name, of_seeds in tables.items():
        whole = pd.concat(of_seeds, names=["seed"]).reset_index("seed")
        whole.to_csv(Path(output, f"{name}.csv"), index=False)


def write(place, table, answers, over):
    """One seed's tables into a folder; the one that says that it is done last."""
    place.mkdir(parents=True, exist_ok=True)
    kinds = {key: by_kind(found) for key, found in answers.items()}
    found = {
        "search": table,
        "kinds": pd.DataFrame(kinds).T.rename_axis(["who", "given"]).reset_index(),
        "leads": leads(answers, over),
        "spoken": spoken_table(answers),
    }
    for name, rows in found.items():
        rows.round(4).to_csv(place / f"{name}.csv", index=False)
