"""Sliders and menus of the notebooks: pictures redrawn from stored numbers, or by asking models.

A cell saves a picture of the default state, which any page shows; where a front-end listens to the
kernel, the same output has controls above the picture. `experiments/play.py` made the numbers.
"""

import base64
import io
import os
import sys
import wave
from functools import cache
from html import escape

import numpy as np
import pandas as pd

from optmerge_core.benchmark.experiments import play as stored
from optmerge_core.benchmark.shipped import is_shipped
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.errors import extra
from optmerge_core.figures import COLORS, LABELS
from optmerge_core.places import checkout

with extra("plots"):
    from matplotlib.figure import Figure
with extra("notebooks"):
    import ipywidgets
    from IPython import get_ipython
    from IPython.display import HTML, Markdown, display

GREY = "#bbbbbb"


def live():
    """Whether somebody can move a slider: the kernel of JupyterLab, Notebook, VS Code or Colab."""
    shell = get_ipython()
    vscode = shell is not None and "__vsc_ipynb_file__" in shell.user_ns
    return "JPY_SESSION_NAME" in os.environ or vscode or "google.colab" in sys.modules


class Play:
    """Controls (name -> widget) over a picture; draw(**their values) -> a matplotlib `Figure`.

    What `draw` raises as a `ValueError` stands under the picture, which stays as it was.
    """

    def __init__(self, draw, **controls):
        self.draw, self.controls = draw, controls
        self.picture = ipywidgets.Image(value=self.png(), format="png")
        self.said = ipywidgets.HTML()
        for control in controls.values():
            control.observe(self._redraw, "value")

    def png(self):
        figure, content = self.draw(**{n: c.value for n, c in self.controls.items()}), io.BytesIO()
        figure.savefig(content, format="png", dpi=80, metadata={"Software": None})
        return content.getvalue()

    def _redraw(self, change):
        try:
            self.picture.value, self.said.value = self.png(), ""
        except ValueError as error:
            self.said.value = escape(str(error))

    def _ipython_display_(self):
        """The picture, and where somebody can move them, the controls; both in one output."""
        bundle = {"image/png": base64.b64encode(self.png()).decode()}
        bundle["text/plain"] = "a picture; its controls need a running kernel"
        if live():
            box = ipywidgets.VBox([*self.controls.values(), self.picture, self.said])
            bundle |= box._repr_mimebundle_()
        display(bundle, raw=True)


def menu(name, options):
    return ipywidgets.Dropdown(description=name, options=options)


def slider(name, values, start):
    return ipywidgets.SelectionSlider(
        description=name, options=[(f"{v:g}", v) for v in values], value=start
    )


def figure_of(panels, width):
    """A figure and its axes in a row, without pyplot: nothing of it is shown by itself."""
    figure = Figure(figsize=(width, 3.4), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, panels))


# ---------------------------------------------------------------- the stored grid


class Grid:
    """The stored merges of one study; a merge is (method, left out or "", rank ratio or "")."""

    def __init__(self, study):
        keys = stored.MERGE[1:]
        scores, spectra = (table[table["study"] == study] for table in tables())
        scores = scores.set_index([*keys, "scaling_coefficient"]).sort_index()
        self.scores = scores[[*TASKS, "Avg"]]
        self.spectra = spectra.set_index(keys).sort_index().drop(columns="study")
        self.methods = [m for m in LABELS if (m, "", "") in self.spectra.index]

    def scaling(self, *merge):
        """The λ above 0 for which a merge has been asked."""
        return [x for x in self.scores.loc[merge].index if x > 0]

    def accuracy(self, scaling, *merge):
        """Per cent per task, and Avg. Raises `ValueError` where it is not stored."""
        try:
            return self.scores.loc[(*merge, scaling)]
        except KeyError:
            raise ValueError(f"λ = {scaling:g} is not stored for {merge[0]}") from None

    def norm(self, scaling, *merge):
        """Length of λ·τm: linear in λ, so stored once."""
        return scaling * self.spectra.loc[merge, "norm"]

    def spectrum(self, scaling, *merge):
        """Share of the full rank -> singular value of λ·τm, a mean over the matrices."""
        values = self.spectra.loc[merge].drop("norm")
        return scaling * values.set_axis(values.index.astype(float))


@cache
def tables(folder=None):
    """The two tables of `experiments/play.py`, of the folder or as shipped."""
    folder = folder or checkout() / "data" / "benchmark"
    return tuple(stored.read(folder / f"{name}.csv") for name in ("play_scores", "play_spectra"))


def grid_of(study):
    """The study's grid; None where there is none."""
    known = is_shipped(study) and study.name in set(tables()[1]["study"])
    return Grid(study.name) if known else None


def missing(study):
    """What stands in a control's place where there is no grid."""
    shipped = ", ".join(tables()[1]["study"].unique())
    return Markdown(f"{study.name}: no stored merges to move; those of {shipped} ship.")


def bars(axis, rows, colors):
    """Accuracy per task and Avg, side by side: label -> row, label -> colour."""
    width = 0.8 / len(rows)
    for number, (label, row) in enumerate(rows.items()):
        places = np.arange(len(row)) + (number - (len(rows) - 1) / 2) * width
        axis.bar(places, row, width, label=label, color=colors[label])
    axis.set_xticks(range(len(row)), row.index, rotation=25, ha="right", rotation_mode="anchor")
    axis.set(ylim=(0, 100), ylabel="validation accuracy (%)")
    axis.legend(frameon=False, fontsize=8, ncols=len(rows), loc="upper right")


def merges(study, *panels):
    """A menu of methods and a slider for λ over `panels`: accuracy, norm, spectrum (all)."""
    panels = panels or ("accuracy", "norm", "spectrum")
    if (grid := grid_of(study)) is None:
        return missing(study)

    def draw(method, scaling):
        merge, label = (method, "", ""), f"{LABELS[method]}, λ = {scaling:g}"
        figure, axes = figure_of(len(panels), 2.2 + 3.1 * len(panels))
        row = grid.accuracy(scaling, *merge)
        for panel, axis in zip(panels, axes, strict=True):
            if panel == "accuracy":
                base = grid.accuracy(0.0, *merge)
                colors = {LABELS["base_model"]: GREY, label: COLORS[method]}
                bars(axis, {LABELS["base_model"]: base, label: row}, colors)
            elif panel == "norm":
                lengths = [grid.norm(scaling, m, "", "") for m in grid.methods]
                fills = [COLORS[m] if m == method else GREY for m in grid.methods]
                axis.barh([LABELS[m] for m in grid.methods], lengths, color=fills)
                axis.invert_yaxis()
                axis.set(xlabel="length of λ·τm (Frobenius norm)")
            else:
                for other in sorted(grid.methods, key=lambda m: m == method):
                    curve = grid.spectrum(scaling, other, "", "")
                    look = {"color": COLORS[method], "lw": 2.5} if other == method else {}
                    axis.plot(curve, **({"color": GREY, "lw": 1} | look))
                axis.set(xlabel="share of the full rank", ylabel="singular value of λ·τm")
                axis.set(yscale="log", ylim=(1e-3, 10))
        length = grid.norm(scaling, *merge)
        figure.suptitle(f"{label}: {row['Avg']:.1f} % on average, length {length:.2f}")
        return figure

    start = study.merge_method if study.merge_method in grid.methods else grid.methods[0]
    method = menu("method", [(LABELS[m], m) for m in grid.methods])
    method.value = start
    steps = grid.scaling(start, "", "")
    return Play(draw, method=method, scaling=slider("λ", steps, 1.0))


def left_out(study):
    """Which expert to leave out of the merge: what it costs its own task, and gives the others."""
    if (grid := grid_of(study)) is None:
        return missing(study)

    def draw(method, expert, scaling):
        whole = grid.accuracy(scaling, method, "", "")
        rows = {"all five experts": whole}
        if expert:
            rows[f"without {expert}"] = grid.accuracy(scaling, method, expert, "")
        figure, (axis,) = figure_of(1, 7)
        bars(axis, rows, {label: c for label, c in zip(rows, (GREY, COLORS[method]), strict=False)})
        last = rows[list(rows)[-1]]
        change = f" ({last['Avg'] - whole['Avg']:+.1f})" if expert else ""
        text = f"{last['Avg']:.1f} % on average{change}"
        axis.set_title(f"{LABELS[method]}, λ = {scaling:g}: {text}")
        return figure

    methods = menu("method", [(LABELS[m], m) for m in reversed(stored.LEFT_OUT_BY)])
    expert = menu("without", [("nobody", ""), *((name, name) for name in study.experts)])
    expert.value = "OCR" if "OCR" in study.experts else ""
    return Play(draw, method=methods, expert=expert, scaling=slider("λ", stored.FEW[1:], 1.0))


def rank_kept(study):
    """How much of its rank OptMerge keeps of every task vector: accuracy and spectrum."""
    if (grid := grid_of(study)) is None:
        return missing(study)
    own = 1 / len(study.experts)
    ratios = sorted([own, *stored.RANK_RATIOS])
    color = COLORS["optmerge"]

    def draw(ratio, scaling):
        merge = ("optmerge", "", "" if ratio == own else str(ratio))
        usual = ("optmerge", "", "")
        row, label = grid.accuracy(scaling, *merge), f"rank ratio {ratio:g}"
        figure, (left, right) = figure_of(2, 9)
        rows = {f"1/N = {own:g}": grid.accuracy(scaling, *usual), label: row}
        bars(left, rows, dict(zip(rows, (GREY, color), strict=True)))
        right.plot(grid.spectrum(scaling, *usual), color=GREY, lw=1)
        right.plot(grid.spectrum(scaling, *merge), color=color, lw=2.5)
        right.set(xlabel="share of the full rank", ylabel="singular value of λ·τm", yscale="log")
        title = f"OptMerge, {label}, λ = {scaling:g}: {row['Avg']:.1f} % on average"
        figure.suptitle(f"{title}, length {grid.norm(scaling, *merge):.2f}")
        return figure

    steps = slider("rank ratio", ratios, 0.05), slider("λ", stored.FEW[1:], 1.0)
    return Play(draw, ratio=steps[0], scaling=steps[1])


# ---------------------------------------------------------------- what a notebook has computed


def length_of_sum(gram, names):
    """Length of λ times the sum of some experts, beside orthogonal and parallel ones (notebook 01).

    gram: inner products of the task vectors, (experts, experts); names: the experts'.
    """
    gram, names = np.asarray(gram), list(names)

    def draw(experts, scaling):
        if not experts:
            raise ValueError("choose one expert at least (Ctrl or Shift for several)")
        rows = [names.index(name) for name in experts]
        part = gram[np.ix_(rows, rows)]
        lengths = {
            "if orthogonal": np.trace(part) ** 0.5,
            "measured": part.sum() ** 0.5,
            "if parallel": np.sqrt(np.diag(part)).sum(),
        }
        figure, (axis,) = figure_of(1, 6.5)
        values = scaling * np.array(list(lengths.values()))
        drawn = axis.barh(list(lengths), values, color=[GREY, COLORS["task_arithmetic"], GREY])
        axis.bar_label(drawn, fmt="%.2f", padding=3)
        axis.invert_yaxis()
        axis.set(xlim=(0, 2.2 * np.sqrt(np.diag(gram)).sum()), xlabel="length of λ·Σ τ")
        axis.set_title(f"{' + '.join(experts)}, λ = {scaling:g}")
        return figure

    chosen = ipywidgets.SelectMultiple(description="experts", options=names, value=names)
    return Play(draw, experts=chosen, scaling=slider("λ", (0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0), 1.0))


def ranks(curve):
    """Own-task accuracy of every expert at a rank ratio (notebook 02).

    curve: columns expert, rank ratio (0: the base model, 1: the expert), accuracy.
    """
    table = curve.pivot(index="expert", columns="rank ratio", values="accuracy")
    table = table.loc[curve["expert"].unique()]

    def draw(ratio):
        figure, (axis,) = figure_of(1, 7)
        axis.bar(table.index, table[1.0], color="#eeeeee", edgecolor=GREY, label="the whole expert")
        label = f"rank ratio {ratio:g}" if ratio else "base model"
        axis.bar(table.index, table[ratio], color=COLORS["optmerge"], width=0.5, label=label)
        axis.set(ylim=(0, 109), ylabel="own-task validation accuracy (%)")
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
        gain = (table[ratio] - table[0.0]).sum() / (table[1.0] - table[0.0]).sum()
        axis.set_title(f"{label}: {gain:.0%} of what fine-tuning gained")
        return figure

    values = sorted(table.columns)
    return Play(draw, ratio=slider("rank ratio", values, values[1]))


def clip(item, said):
    """One clip's pictures, a question about it, and what everyone answers (notebook 04).

    said: a row a question; columns question, answer, then everyone who was asked.
    """
    said = said.reset_index() if "question" not in said else said

    def draw(question):
        row = said.set_index("question").loc[question]
        figure, axes = figure_of(len(item.frames), 8)
        for number, (axis, picture) in enumerate(zip(axes, item.frames, strict=True)):
            axis.imshow(picture)
            axis.set_title(f"picture {number + 1}", fontsize=9)
            axis.axis("off")
        right = row["answer"]
        texts = [
            f"{who}: {reply} ({'right' if reply == right else 'wrong'})"
            for who, reply in row.drop("answer").items()
        ]
        figure.suptitle(f"{question}  (right: {right})\n{'     '.join(texts)}", fontsize=10)
        return figure

    return Play(draw, question=menu("question", list(said["question"])))


def player(sound, rate):
    """A player that an untrusted notebook keeps too: JupyterLab takes <source> out of others.

    sound: (samples,) between -1 and 1; rate: samples a second.
    """
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((32767 * np.clip(sound, -1, 1)).astype("<i2").tobytes())
    text = base64.b64encode(content.getvalue()).decode()
    return HTML(f'<audio controls src="data:audio/wav;base64,{text}"></audio>')


def answers_table(axis, rows):
    """Who says what, as text: DataFrame with columns who, answer, right."""
    axis.axis("off")
    for number, row in enumerate(pd.DataFrame(rows).itertuples()):
        weight = "bold" if row.right else "normal"
        text = f"{row.who}:  {row.answer}"
        axis.text(0, 1 - (number + 1) / (len(rows) + 1), text, weight=weight, fontsize=10)
