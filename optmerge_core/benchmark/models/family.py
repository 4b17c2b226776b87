"""What the model families share: prompts, image inputs, the language model's configuration."""

from functools import cached_property

import torch

MARK = "\0"  # stands for a text where a template is looked at


class Prompts:
    """Prompts about one image, and image inputs without the processor's overhead per image.

    A family's processor adds `placeholder` (the image in a prompt, as the chat template writes
    it), `block` (the placeholder after expansion to image tokens) and `arrange`.
    """

    @cached_property
    def frame(self):
        """What the chat template puts before a question, before its answer and between turns."""

        def user(*parts):
            return {"role": "user", "content": [*parts, {"type": "text", "text": MARK}]}

        turns = user({"type": "image"}), {"role": "assistant", "content": MARK}, user()
        text = self.apply_chat_template([*turns], tokenize=False, add_generation_prompt=True)
        return text.split(MARK)[:3]

    def prompt(self, question, image=None):
        """The chat template applied to one image and one question, up to the answer."""
        start, middle, _ = self.frame
        if image is not None:
            start = start.replace(self.placeholder, image)
        return f"{start}{question}{middle}"

    def conversation(self, turns):
        """A conversation about one image: prompt, answer, prompt, answer, ..., expanded."""
        parts, eos = [], self.tokenizer.eos_token
        _, middle, between = self.frame
        for number, (question, answer, *_) in enumerate(turns):
            again = f"{between.removeprefix(eos)}{question}{middle}"
            parts += [again if number else self.prompt(question, self.block), answer + eos]
        return parts

    def image_inputs(self, images, input_ids):
        """uint8 (b, side, side, 3) and prompts (b, t) -> what the model takes beside `input_ids`.

        Equal to the processor's own output (a test compares them).
        """
        settings = self.image_processor
        mean, std = torch.tensor(settings.image_mean), torch.tensor(settings.image_std)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        return self.arrange((pixels - mean[:, None, None]) / std[:, None, None], input_ids)


def stop_at_the_end(model, tokenizer):
    """The model, which ends an answer where the tokenizer does, whatever its own settings."""
    settings = model.generation_config
    settings.bos_token_id = None
    settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model


def text_config(tokenizer, width, layers):
    """A Qwen2 language model of four heads: what both families' `text_config` say."""
    return {
        "initializer_range": 0.06,
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
