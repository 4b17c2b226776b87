"""Figure 1's idea as a diagram: experts to task vectors to one model, modalities to Omni."""

from optmerge_core.errors import extra
from optmerge_core.figures import expert_palette

GREY, MERGED = "#555555", "#222222"
HEIGHT = 30
"""Of the drawing; its width is twice 100, one half for each kind of merge."""


def draw_idea(axis, experts, specialists=("vision", "audio", "video")):
    """Draw both kinds of merge into an axis.

    experts: names of capabilities, each fine-tuned from one base model; specialists: modalities,
    each with a tower of its own on the same language model.
    """
    axis.set(xlim=(-1, 200), ylim=(0, HEIGHT))
    axis.axis("off")
    model = "one model\n$\\theta_0 + \\lambda\\,\\tau_m$"
    _half(axis, 0, "base model\n$\\theta_0$", experts, "{} expert", model)
    omni = f"one model,\n{len(specialists)} towers\n(Omni)"
    tower = "language model\n+ {} tower"
    _half(axis, 102, "language\nmodel $\\theta_0$", specialists, tower, omni)
    for middle, text in ((49, "capabilities"), (151, "modalities")):
        axis.text(middle, HEIGHT, text, ha="center", va="top", weight="bold")


def _rows(names):
    """Name -> the height of its row, from the top."""
    step = (HEIGHT - 6) / len(names)
    return [(name, HEIGHT - 6 - step * (number + 0.5) + 1) for number, name in enumerate(names)]


def _half(axis, left, base, names, text, merged):
    """Base, models, their task vectors, the merged one and the model it makes, from `left` on."""
    colors = expert_palette(names)
    high = 0.8 * (HEIGHT - 6) / len(names)
    _box(axis, (left, 11, 14, 8), base, GREY)
    for name, y in _rows(names):
        _arrow(axis, (left + 14, 15), (left + 21, y))
        _box(axis, (left + 21, y - high / 2, 19, high), text.format(name), colors[name])
        _arrow(axis, (left + 40, y), (left + 45, y))
        tau = f"$\\tau_\\mathrm{{{name}}}$"
        _box(axis, (left + 45, y - high / 2, 13, high), tau, colors[name])
        _arrow(axis, (left + 58, y), (left + 64, 15))
    _box(axis, (left + 64, 10, 14, 10), "$\\tau_m$\nfrom weights\nalone", MERGED)
    _arrow(axis, (left + 78, 15), (left + 83, 15))
    _box(axis, (left + 83, 10, 14, 10), merged, MERGED)


def _box(axis, place, text, color):
    with extra("plots"):
        from matplotlib.patches import FancyBboxPatch

    x, y, width, height = place
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=1", facecolor="white",
        edgecolor=color, linewidth=1.5,
    )  # fmt: skip
    axis.add_patch(shape)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)


def _arrow(axis, start, end):
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY, "linewidth": 0.9})
