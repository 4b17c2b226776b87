"""Figure 1's diagram: every expert and modality is in it, nothing lies outside or overlaps."""

from itertools import combinations

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from optmerge_core.benchmark.diagram import draw_idea


def test_all_names_are_in_boxes_that_neither_overlap_nor_leave_the_picture():
    figure, axis = plt.subplots(figsize=(15, 2.9))
    draw_idea(axis, ["VQA", "Geometry", "Chart", "OCR", "Grounding"])
    texts = [text.get_text() for text in axis.texts]
    for name in ("VQA expert", "Grounding expert", "language model\n+ video tower"):
        assert texts.count(name) == 1
    boxes = [p.get_path().get_extents() for p in axis.patches if isinstance(p, FancyBboxPatch)]
    assert len(boxes) == 2 * 3 + 2 * 5 + 2 * 3  # base, τm, model; a model and its τ each
    for box in boxes:
        assert axis.viewLim.x0 <= box.x0 and box.x1 <= axis.viewLim.x1
        assert axis.viewLim.y0 <= box.y0 and box.y1 <= axis.viewLim.y1
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    plt.close(figure)
