"""What the playground's sliders show: stored grids redrawn, and models of a study asked at once.

Everything answers in well under half a second: accuracies are the tables that notebook 05 wrote,
norms grow with λ, and a merged task vector is kept when it has been computed once.
"""

from base64 import b64encode
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from PIL import Image

from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.benchmark.tasks.samples import image_hash, sample
from optmerge_core.errors import extra
from optmerge_core.figures import COLORS, LABELS, MARKERS
from optmerge_core.study.open import open_study


class Grid:
    """Validation accuracy by method and λ, and the norm of the merged task vector at λ = 1."""

    def __init__(self, figures):
        table = pd.read_csv(Path(figures, "figxx_scaling.csv"))
        self.accuracy = table.pivot(
            index="scaling_coefficient", columns="method", values="accuracy"
        )
        norms = pd.read_csv(Path(figures, "tablexx_methods.csv"), index_col="method")["norm"]
        self.norm = {m: norms[LABELS[m]] for m in self.accuracy if LABELS[m] in norms}

    @property
    def scalings(self):
        """The λ at which every method has been asked."""
        return self.accuracy.dropna().index.tolist()

    def draw(self, method="optmerge", scaling=1.0):
        """Accuracy of all methods over λ, the chosen one in colour; and norms at that λ."""
        with extra("plots"):
            import matplotlib.pyplot as plt
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
        for other, curve in self.accuracy.items():
            curve = curve.dropna()
            look = {"color": "#cccccc", "linewidth": 1}
            if other == method:
                look = {"color": COLORS[method], "marker": MARKERS[method], "zorder": 3}
            left.plot(curve.index, curve, label=LABELS[other] if other == method else None, **look)
        found = self.accuracy.loc[scaling, method]
        left.plot(scaling, found, "o", markersize=14, fillstyle="none", color="black", zorder=4)
        title = f"{LABELS[method]} at λ = {scaling:g}: {found:.1f} %"
        left.set(title=title, xlabel="λ", ylabel="average validation accuracy (%)", xscale="log")
        left.set_xticks(self.scalings, [f"{x:g}" for x in self.scalings])
        left.minorticks_off()
        norms = {LABELS[m]: scaling * norm for m, norm in self.norm.items()}
        colors = [COLORS[m] if m == method else "#cccccc" for m in self.norm]
        right.barh(list(norms), list(norms.values()), color=colors)
        right.invert_yaxis()
        longest = max(self.norm.values()) * max(self.scalings)
        right.set(title="length of what is added", xlabel="λ ‖τm‖", xlim=(0, 1.05 * longest))
        figure.tight_layout()
        return figure


class Bench:
    """A study's models, to be asked one question at a time.

    Merged task vectors are kept by method and experts, factors of task vectors once for all ranks.
    """

    def __init__(self, recipe):
        self.study = open_study(recipe)
        self.names, self.base = self.study.names, self.study.base
        self.evaluator = evaluator_for(self.study.recipe.base_model, self.row("VQA", 0))
        self.merged = cache(self._merged)
        self.factors = cache(self._factors)

    def row(self, task, index, question=None):
        """A test picture as a data set of one question: its own, or the one given."""
        drawn = sample(task, "test", index)
        asked, answer, kind = drawn.turns[0]
        if question and question != asked:
            asked, answer, kind = question, "", "own"
        row = {
            "question": asked, "answer": answer, "kind": kind, "task": task,
            "hash": image_hash(drawn.image), "image": Image.fromarray(drawn.image),
        }  # fmt: skip
        return Dataset.from_list([row])

    def _merged(self, method, without=None):
        experts = {n: e for n, e in self.study.experts.items() if n != without}
        return self.study.merge_tensors(method, experts=experts)

    def _factors(self, expert):
        """Name -> U, S, Vᵀ of the expert's task vectors, (m, n) matrices; others as they are."""
        task_vectors = self.study.task_vectors()
        place = list(self.study.experts).index(expert)
        vectors = {n: task_vectors[n][place] for n in self.names}
        return {
            n: torch.linalg.svd(t, full_matrices=False) if t.ndim == 2 else t
            for n, t in vectors.items()
        }

    def truncated(self, expert, ratio):
        """The expert's task vector with that share of each matrix's directions; kept energy."""
        vectors, kept, total = {}, 0.0, 0.0
        for name, factors in self.factors(expert).items():
            if torch.is_tensor(factors):
                vectors[name] = factors
                continue
            U, S, V = factors
            rank = max(1, round(ratio * len(S)))
            vectors[name] = (U[:, :rank] * S[:rank]) @ V[:rank]
            kept, total = kept + float(S[:rank].square().sum()), total + float(S.square().sum())
        return vectors, kept / total

    def ask(self, task, index, question=None, method="optmerge", scaling=1.0, without=None):
        """Base, the task's expert and the merged model: (who, what it says, whether it is right).

        Right is None for a question of one's own.
        """
        asking = self.evaluator.asking(self.row(task, index, question))
        merged = f"{LABELS[method]}, λ = {scaling:g}" + f", without {without}" * bool(without)
        said = {
            "base": asking.answer(self.base, self.names),
            f"{task} expert": asking.answer(self.study.experts[task], self.names),
            merged: asking.answer_merged(self.base, self.merged(method, without), scaling),
        }
        return [(who, *_read(answers)) for who, answers in said.items()]

    def ask_truncated(self, task, index, ratio):
        """The task's expert with a part of its directions, beside base and whole expert."""
        asking = self.evaluator.asking(self.row(task, index))
        vectors, kept = self.truncated(task, ratio)
        said = {
            "base": asking.answer(self.base, self.names),
            f"{task} expert": asking.answer(self.study.experts[task], self.names),
            f"with {ratio:.0%} of its directions ({kept:.0%} of its energy)": (
                asking.answer_merged(self.base, vectors, 1.0)
            ),
        }
        return [(who, *_read(answers)) for who, answers in said.items()]

    def draw(self, task, index, replies, question=None):
        """A picture with its question, and beside it who says what."""
        with extra("plots"):
            import matplotlib.pyplot as plt
        (row,) = self.row(task, index, question)
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), width_ratios=[1, 2.2])
        left.imshow(row["image"])
        for axis in (left, right):
            axis.axis("off")
        answer = f"   (answer: {_plain(row['answer'])})" if row["answer"] else ""
        right.text(0, 0.9, row["question"] + answer, weight="bold")
        for line, (who, said, right_one) in enumerate(replies):
            color = {True: "#0072b2", False: "#a04000", None: "black"}[right_one]
            mark = {True: " (right)", False: " (wrong)", None: ""}[right_one]
            right.text(0, 0.65 - 0.2 * line, f"{who}: {said}{mark}", color=color)
        return figure


def _plain(text):
    """Location tokens as numbers."""
    return text.replace("<loc", " ").replace(">", "").strip()


def _read(answers):
    (row,) = answers.to_dict("records")
    return _plain(row["prediction"]) or "–", bool(row["correct"]) if row["answer"] else None


def sound(wave, rate):
    """HTML with the sound inside, 16-bit PCM: it plays in a notebook that is not trusted too.

    wave: (samples,) float, between -1 and 1; rate: samples a second.
    """
    with extra("benchmark"):
        from scipy.io import wavfile

    file = BytesIO()
    wavfile.write(file, rate, (np.clip(wave, -1, 1) * 32767).astype(np.int16))
    data = b64encode(file.getvalue()).decode()
    return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'


def board(draw, **controls):
    """Widgets above a picture that is drawn anew when one of them is moved.

    draw: a function of the controls' values that returns a figure.
    """
    with extra("notebooks"):
        import ipywidgets
        import matplotlib.pyplot as plt
        from IPython.display import display

    def redraw(**values):
        figure = draw(**values)
        display(figure)
        plt.close(figure)

    shown = ipywidgets.interactive_output(redraw, controls)
    return ipywidgets.VBox([ipywidgets.HBox(list(controls.values())), shown])
