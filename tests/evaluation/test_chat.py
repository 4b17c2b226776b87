"""Prompts to checkpoints with a processor of their own: words, and the size of pictures."""

from types import SimpleNamespace

import pytest
from PIL import Image
from transformers.image_utils import SizeDict

from optmerge_core.evaluation import chat


def test_prompts_say_what_is_asked_and_in_what_form():
    image = Image.new("RGB", (56, 28))
    asked = {"image": image, "question": "what color is it ?", "answer": "red", "task": "VQA"}
    (message,) = chat.messages(asked)
    picture, text = message["content"]
    assert picture["image"].size == (896, 448)
    assert text["text"].startswith("what color is it ?\n") and "red" not in text["text"]
    asked |= {"task": "Grounding", "answer": "<loc0><loc1><loc2><loc3>"}
    assert "0 to 1000: " in chat.messages(asked)[0]["content"][1]["text"]
    asked |= {"answer": "12 30 48 75", "box_unit": 100}
    assert "0 to 100: " in chat.messages(asked)[0]["content"][1]["text"]
    large = Image.new("RGB", (500, 600))
    assert chat.enlarged(large).size == (500, 600)


@pytest.mark.parametrize(
    "size, side",
    [
        ({"height": 112, "width": 112}, 112),
        ({"height": 896, "width": 896}, 448),
        ({"shortest_edge": 3136, "longest_edge": 10**6}, 448),
        (None, 448),
    ],
)
def test_a_picture_is_enlarged_to_what_the_processor_makes_of_it(size, side):
    """And not beyond, where that is one size: it would be made small again."""
    seen = []

    def template(conversations, **_):
        seen.extend(conversations[0][0]["content"][0]["image"].size)

    processor = SimpleNamespace(
        image_processor=SimpleNamespace(size=size and SizeDict(**size)),
        apply_chat_template=template,
    )
    image = Image.new("RGB", (56, 28))
    sample = {"image": image, "question": "?", "answer": "red", "task": "VQA"}
    chat.prepare(processor, [sample])
    assert seen == [2 * side, side]
