"""What a model knows without a picture, and how much of it training or merging made it forget.

Questions of general knowledge are answered in a sentence, greedily; how a page of text goes on is
foretold word by word. Both are compared with an original, the language model that all came from.
"""

import re

import torch
from torch.nn.functional import kl_div, log_softmax


def prompts(processor, questions):
    """Questions as the chat template asks them, each in a conversation of its own, without picture.

    processor: a processor or a tokenizer.
    """

    def written(contents):
        return [
            processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            for content in contents
        ]

    texts = written(questions)
    if all(question in text for question, text in zip(questions, texts, strict=True)):
        return texts
    return written([[{"type": "text", "text": question}] for question in questions])


@torch.inference_mode()
def chat_answers(model, processor, questions, max_new_tokens=24):
    """Greedy answers to questions without a picture, of each its first sentence: a list of texts.

    processor: a processor or a tokenizer, with a chat template and a token for padding.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = tokenizer(
        prompts(processor, questions), return_tensors="pt", padding=True, padding_side="left",
        add_special_tokens=False,
    ).to(model.device)  # fmt: skip
    ids = inputs["input_ids"]
    tokens = model.generate(
        input_ids=ids, attention_mask=inputs["attention_mask"], do_sample=False,
        max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    answers = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
    return [first_sentence(answer) for answer in answers]


def first_sentence(text):
    """What comes before a text's second sentence or line; all of it if there is none."""
    return re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]


def knows(answer, key):
    """Whether an answer has the key in it, or one of several, "8|eight": whole words, any case."""
    words = "|".join(map(re.escape, key.split("|")))
    return re.search(rf"(?<!\w)({words})(?!\w)", answer, re.IGNORECASE) is not None


@torch.inference_mode()
def next_words(model, processor, text):
    """A text's t tokens but the first, (t - 1), and log p of every token there, (t - 1, tokens).

    Each given all tokens before it; natural logarithms, at least float32, on the CPU. Raises
    `ValueError` for a text that is longer than what the model takes.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    longest = model.config.get_text_config().max_position_embeddings
    if not 2 <= ids.shape[1] <= longest:
        raise ValueError(
            f"a text of {ids.shape[1]} tokens; give one of 2 to {longest}, what the model takes"
        )
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1].cpu()
    return ids[0, 1:], log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def perplexity(tokens, log_probabilities):
    """exp of the mean of -log p over a text's tokens but the first, as `next_words` gives them."""
    return float(torch.exp(-log_probabilities.gather(1, tokens[:, None]).double().mean()))


class Forgetting:
    """How far models are from an original, in what they answer and in how they foretell a page.

    questions: a table with columns question and key (as `knows` takes it); page: a text. Of the
    original its answers and its log-probabilities are kept, 4 bytes a token of the page and of the
    vocabulary.
    """

    def __init__(self, original, processor, questions, page):
        self.questions, self.page = questions, page
        self.answers = chat_answers(original, processor, list(questions["question"]))
        self.log_probabilities = next_words(original, processor, page)[1]

    def __call__(self, model, processor):
        """A model's answers, and a row of numbers about it (name -> value).

        Right answers and those that are the original's to the letter, in per cent; the page's
        perplexity; the mean Kullback-Leibler divergence, in nats, of the model's next words from
        the original's. Raises `ValueError` for a model of another vocabulary.
        """
        answers = chat_answers(model, processor, list(self.questions["question"]))
        tokens, found = next_words(model, processor, self.page)
        if found.shape != self.log_probabilities.shape:
            raise ValueError(
                f"next words of shape {tuple(found.shape)}, the original's "
                f"{tuple(self.log_probabilities.shape)}: is this a model of another tokenizer?"
            )
        right = map(knows, answers, self.questions["key"])
        same = [answer == other for answer, other in zip(answers, self.answers, strict=True)]
        divergence = kl_div(found, self.log_probabilities, log_target=True, reduction="batchmean")
        return answers, {
            "knows": 100 * sum(right) / len(answers),
            "answers as the original": 100 * sum(same) / len(answers),
            "perplexity": perplexity(tokens, found),
            "divergence": float(divergence),
        }
