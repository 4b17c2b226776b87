"""Where things are, in words that leave no doubt which thing is meant."""

from optmerge_core.benchmark.tasks.english.drawing import IMAGE_SIZE

CLEAR = 13  # pixels by which centres differ where one thing is called left of or above another
THIRD = IMAGE_SIZE / 3
CORNERS = ("top left", "top right", "bottom left", "bottom right")
SIDES = {
    "on the left": (0, 1),
    "on the right": (0, -1),
    "at the top": (1, 1),
    "at the bottom": (1, -1),
}
"""Words for the outermost thing -> axis and sign."""
BESIDE = {
    "to the left of": (0, -1),
    "to the right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
"""Words for the one thing on that side of another -> axis and sign."""


def unlike(items, item, key):
    """Whether no other item has the same, by a function of an item."""
    return sum(key(other) == key(item) for other in items) == 1


def called(items, item):
    """What a thing alone can be called by its name: "the red car"; None if there are two."""
    unique = unlike(items, item, lambda i: i.full_name)
    return f"the {item.full_name}" if unique else None


def outermost(items, side):
    """The item farthest to a side; None if another is about as far."""
    axis, sign = SIDES[side]
    first, *others = sorted(items, key=lambda i: sign * i.center[axis])
    clear = all(abs(first.center[axis] - other.center[axis]) >= CLEAR for other in others)
    return first if clear else None


def in_corner(items, corner):
    """The one item in a corner (a ninth of the picture), if no other is near that corner."""
    vertical, horizontal = corner.split()

    def depth(item):  # how far its centre is out of the corner's ninth, in pixels
        x, y = item.center
        return max(
            (x if horizontal == "left" else IMAGE_SIZE - x) - THIRD,
            (y if vertical == "top" else IMAGE_SIZE - y) - THIRD,
        )

    found = [item for item in items if depth(item) < 10]
    return found[0] if len(found) == 1 and depth(found[0]) < 0 else None


def places(items):
    """[(words, item)]: every place that is clearly one item's: "on the left", "in the top left"."""
    found = [(side, outermost(items, side)) for side in SIDES] if len(items) > 1 else []
    found += [(f"in the {corner} corner", in_corner(items, corner)) for corner in CORNERS]
    middle = [i for i in items if all(abs(v - IMAGE_SIZE / 2) < THIRD / 2 + 6 for v in i.center)]
    if len(middle) == 1 and middle[0].region == "middle":
        found.append(("in the middle", middle[0]))
    return [(words, item) for words, item in found if item]


def clear_region(item):
    """Whether an item's centre is well within one ninth of the picture."""
    return all(min(abs(v - THIRD), abs(v - 2 * THIRD)) >= 4 for v in item.center)


def sides(first, second):
    """(true word, false word) for each axis on which two items differ clearly."""
    for axis, words in enumerate((("left of", "right of"), ("above", "below"))):
        distance = first.center[axis] - second.center[axis]
        if abs(distance) >= CLEAR:
            yield words if distance < 0 else words[::-1]


def beside(items, item):
    """[(words, item)]: what alone is left of, right of, above or below an item."""
    for word, (axis, sign) in BESIDE.items():
        away = [(sign * (o.center[axis] - item.center[axis]), o) for o in items if o is not item]
        near = [(distance, other) for distance, other in away if distance > 0]
        if len(near) == 1 and near[0][0] >= CLEAR and near[0][1].name != item.name:
            yield word, near[0][1]
