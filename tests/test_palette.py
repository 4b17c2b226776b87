"""The colours of methods and tasks: seen on white, and told apart by colour-blind readers too."""

from itertools import combinations

import numpy as np
import pytest

from optmerge_core import TABLE_METHODS
from optmerge_core.figures import COLORS, EXPERT_COLORS

SEEN = {
    "by most": np.eye(3),
    "without red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "without green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "without blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
"""Linear RGB as it is seen: Machado, Oliveira and Fernandes (2009), severity 1."""
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
"""Of linear sRGB, white D65."""
IN_TABLES = {name: COLORS[name] for name in ("base_model", *TABLE_METHODS, "mixture")}


def linear(color):
    """Linear RGB in [0, 1] of #rrggbb, by sRGB's curve."""
    x = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def contrast(color):
    """With white, as WCAG defines it: 1 to 21."""
    return 1.05 / (XYZ[1] @ linear(color) + 0.05)


def lab(rgb):
    """CIE L*a*b* of linear RGB."""
    x = XYZ @ np.clip(rgb, 0, 1) / XYZ.sum(1)
    f = np.where(x > 216 / 24389, np.cbrt(x), (24389 / 27 * x + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def apart(one, other, seen):
    """Distance in CIE Lab for a reader of SEEN; 2 is just seen."""
    matrix = np.array(SEEN[seen])
    return np.linalg.norm(lab(matrix @ linear(one)) - lab(matrix @ linear(other)))


def test_black_white_and_red_have_the_known_values():
    assert contrast("#000000") == pytest.approx(21) and contrast("#ffffff") == pytest.approx(1)
    assert apart("#000000", "#ffffff", "by most") == pytest.approx(100, abs=0.1)
    assert lab(linear("#ff0000")) == pytest.approx([53.2, 80.1, 67.2], abs=0.1)


@pytest.mark.parametrize("color", [*COLORS.values(), *EXPERT_COLORS])
def test_every_colour_is_seen_on_white(color):
    assert contrast(color) >= 3


@pytest.mark.parametrize("seen", SEEN)
def test_every_reader_tells_them_apart(seen):
    def least(pairs):
        return min(apart(one, other, seen) for one, other in pairs)

    assert least(combinations(IN_TABLES.values(), 2)) >= 16
    assert least(combinations(EXPERT_COLORS[:5], 2)) >= 20
    assert least(combinations(COLORS.values(), 2)) >= 12
    assert least(combinations(EXPERT_COLORS, 2)) >= 12
    assert least((a, b) for a in EXPERT_COLORS for b in IN_TABLES.values()) >= 10
