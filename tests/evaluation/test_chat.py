"""Prompts to checkpoints with a processor of their own."""

from PIL import Image

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
