"""What a model forgot: answers without a picture and a page's next words, by hand."""

import math

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optmerge_core.evaluation.evaluator import load_model
from optmerge_core.evaluation.forgetting import (
    Forgetting,
    chat_answers,
    first_sentence,
    knows,
    next_words,
    perplexity,
    prompts,
)

WORDS = ["<pad>", "<end>", "capital", "of", "France", "Paris", "loop", "Japan", "Tokyo", "?"]
FOLLOWS = {"France": "Paris", "Paris": "<end>", "Japan": "Tokyo", "Tokyo": "of", "of": "<end>"}
TEXT = "{% for message in messages %}{{ message.content }}{% endfor %}"
PARTS = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"
SURE = 5.0  # a logit


def make_tokenizer(template=TEXT):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<pad>",
        chat_template=template,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=20, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, initializer_range=0.7,
        pad_token_id=0, bos_token_id=None, eos_token_id=1, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def parrot():
    """Says what FOLLOWS the last word, else that word again: its logit is SURE, others' are 0."""
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    ones = torch.eye(len(WORDS), model.config.hidden_size)
    following = [WORDS.index(FOLLOWS.get(word, word)) for word in WORDS]
    model.model.embed_tokens.weight.data = ones
    norm = math.sqrt(model.config.hidden_size)  # of what RMSNorm makes of a vector
    head = torch.zeros_like(ones)
    for word, after in enumerate(following):
        head[after] += ones[word] * SURE / norm
    model.lm_head.weight.data = head
    return model


def test_an_answer_ends_at_the_end_token_or_at_the_longest(parrot, tokenizer):
    questions = ["capital of France", "loop", "capital Japan"]
    answers = chat_answers(parrot, tokenizer, questions, max_new_tokens=4)
    assert answers == ["Paris", "loop loop loop loop", "Tokyo of"]


def test_an_answer_does_not_depend_on_what_else_is_asked(tokenizer):
    model = llama()
    questions = [f"capital {'of ' * i}{word}" for i, word in enumerate(WORDS[2:9])]
    alone = [chat_answers(model, tokenizer, [question], 6)[0] for question in questions]
    assert chat_answers(model, tokenizer, questions, 6) == alone
    assert len(set(alone)) > 3


def test_a_processor_asks_as_its_tokenizer_does(parrot, tokenizer):
    class Processor:
        def __init__(self):
            self.tokenizer, self.apply_chat_template = tokenizer, tokenizer.apply_chat_template

    assert chat_answers(parrot, Processor(), ["France"]) == ["Paris"]
    assert next_words(parrot, Processor(), "of France")[0].tolist() == [WORDS.index("France")]


def test_a_template_that_takes_parts_alone_is_given_parts():
    assert prompts(make_tokenizer(), ["France ?"]) == ["France ?"]
    assert prompts(make_tokenizer(PARTS), ["France ?", "Japan"]) == ["France ?", "Japan"]


@pytest.mark.parametrize(
    "text, sentence",
    [
        (" It is Au. It is a metal.", "It is Au."),
        ("It is 3.5 km long! Really?", "It is 3.5 km long!"),
        ("One\ntwo", "One"),
        ("cut off in the", "cut off in the"),
        ("", ""),
    ],
)
def test_an_answer_is_its_first_sentence(text, sentence):
    assert first_sentence(text) == sentence


@pytest.mark.parametrize(
    "answer, key, known",
    [
        ("The capital of France is Paris.", "Paris", True),
        ("paris", "Paris", True),
        ("Parisian", "Paris", False),
        ("A spider has eight legs.", "8|eight", True),
        ("8", "8|eight", True),
        ("18", "8|eight", False),
        ("It was Leonardo da Vinci", "da Vinci|Raphael", True),
        ("H2O", "H.O", False),
        ("", "Paris", False),
    ],
)
def test_a_right_answer_has_a_key_as_a_whole_word(answer, key, known):
    assert knows(answer, key) is known


def test_perplexity_by_hand():
    log_probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.375, 0.5]]).log()
    # exp((log 4 + log 2) / 2)
    assert perplexity(torch.tensor([1, 2]), log_probabilities) == pytest.approx(math.sqrt(8))


def test_perplexity_of_a_model_with_known_logits(parrot, tokenizer):
    tokens, found = next_words(parrot, tokenizer, "France Paris Paris")
    sure, other = math.exp(SURE), len(WORDS) - 1
    right, wrong = sure / (sure + other), 1 / (sure + other)  # p(Paris | France), p(Paris | Paris)
    assert tokens.tolist() == 2 * [WORDS.index("Paris")]
    assert perplexity(tokens, found) == pytest.approx((right * wrong) ** -0.5, rel=1e-4)


def test_a_model_that_knows_nothing_is_as_perplexed_as_it_has_words(tokenizer):
    model = llama()
    model.lm_head.weight.data.zero_()
    assert perplexity(*next_words(model, tokenizer, "of of Japan ?")) == pytest.approx(len(WORDS))


def test_next_words_are_those_after_all_before_them(tokenizer):
    model = llama().double()
    words = "capital of Japan ? Tokyo".split()
    tokens, found = next_words(model, tokenizer, " ".join(words))
    assert found.dtype == torch.float64 and found.shape == (4, len(WORDS))
    for i, row in enumerate(found):
        ids = torch.tensor([[WORDS.index(word) for word in words[: i + 1]]])
        assert torch.allclose(row, model(ids).logits[0, -1].log_softmax(-1))
        assert tokens[i] == WORDS.index(words[i + 1])
    assert next_words(model.half(), tokenizer, "of of")[1].dtype == torch.float32


def test_a_page_of_no_next_word_or_too_many_is_refused(tokenizer):
    for count in (1, 17):
        with pytest.raises(ValueError, match=f"{count} tokens; give one of 2 to 16"):
            next_words(llama(), tokenizer, "of " * count)


def test_an_internvl_model_answers_without_a_picture(tiny):
    model, tokenizer = load_model(tiny.base), AutoTokenizer.from_pretrained(tiny.base)
    tokens, found = next_words(model, tokenizer, "what colour red")
    ids = torch.tensor([[3, 4, 5]])
    hidden = model.model.language_model(input_ids=ids).last_hidden_state
    assert tokens.tolist() == [4, 5]
    assert torch.allclose(found, model.lm_head(hidden)[0, :2].log_softmax(-1), atol=1e-6)
    questions = ["what colour", "red"]
    expected = [chat_answers(model, tokenizer, [question], 5)[0] for question in questions]
    assert chat_answers(model, tokenizer, questions, 5) == expected


QUESTIONS = pd.DataFrame(
    {"question": ["France", "Japan", "Paris ?"], "key": ["Paris", "Kyoto", "no"]}
)
PAGE = "capital of France ? Paris of Japan"


def test_a_model_has_forgotten_nothing_of_its_own(parrot, tokenizer):
    forgetting = Forgetting(parrot, tokenizer, QUESTIONS, PAGE)
    answers, row = forgetting(parrot, tokenizer)
    assert answers == forgetting.answers == ["Paris", "Tokyo of", "?"]
    assert row == {
        "knows": pytest.approx(100 / 3),
        "answers as the original": 100,
        "perplexity": perplexity(*next_words(parrot, tokenizer, PAGE)),
        "divergence": pytest.approx(0, abs=1e-6),
    }


def test_what_another_model_forgot_by_hand(parrot, tokenizer):
    other = llama(seed=1)
    answers, row = Forgetting(parrot, tokenizer, QUESTIONS, PAGE)(other, tokenizer)
    p = next_words(parrot, tokenizer, PAGE)[1].double()
    q = next_words(other, tokenizer, PAGE)[1].double()
    expected = sum(float(a.exp() * (a - b)) for a, b in zip(p.flatten(), q.flatten(), strict=True))
    assert row["divergence"] == pytest.approx(expected / len(p), rel=1e-5)
    assert row["divergence"] > 0.1
    assert answers == chat_answers(other, tokenizer, list(QUESTIONS["question"]))
    assert row["answers as the original"] == 0


def test_a_model_of_another_vocabulary_is_refused(parrot, tokenizer):
    other = llama()
    other.resize_token_embeddings(len(WORDS) + 1)
    with pytest.raises(ValueError, match=r"\(6, 11\), the original's \(6, 10\): .* tokenizer"):
        Forgetting(parrot, tokenizer, QUESTIONS, PAGE)(other, tokenizer)
