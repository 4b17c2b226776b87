"""What keeps a model that learns to see from forgetting how to chat: conversations with itself.

SmolLM2 is let to say what a user might ask (its chat template up to the user's turn) and what it
answers; while the base learns, its adapter is held to the original's distribution on these.
"""

import json

import torch
from torch.nn.functional import kl_div, log_softmax
from tqdm.auto import tqdm

from optmerge_core.benchmark.models.smol import SYSTEM
from optmerge_core.places import checkout

WIDTH = 128  # tokens of a conversation at most
POSITIONS = 384  # of a batch's tokens, those that are compared: each costs 49 152 logits twice


@torch.inference_mode()
def conversations(model, tokenizer, count, seed=0, batch=24):
    """Texts of one question and one answer each, system prompt and all: `count` of them."""
    torch.manual_seed(seed)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    texts, bar = [], tqdm(total=count, desc="conversations")
    while len(texts) < count:
        start = tokenizer(SYSTEM + "<|im_start|>user\n", return_tensors="pt")["input_ids"]
        asked = model.generate(
            start.repeat(batch, 1), do_sample=True, top_k=0, max_new_tokens=32, **ends
        )
        ended = [row for row in asked.tolist() if row[start.shape[1] :].count(ends["eos_token_id"])]
        prompts = [f"{text}\n<|im_start|>assistant\n" for text in _texts(tokenizer, ended)]
        given = tokenizer(prompts, return_tensors="pt", padding=True)
        answers = model.generate(**given, do_sample=False, max_new_tokens=48, **ends)
        texts += _texts(tokenizer, answers.tolist())
        bar.update(len(prompts))
    return texts[:count]


def shipped_conversations():
    """Those that `conversations` made once, which take ten minutes to make."""
    path = checkout() / "data" / "benchmark" / "smol" / "conversations.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _texts(tokenizer, rows):
    """What rows of tokens say, without padding."""
    pad = tokenizer.pad_token_id
    return [tokenizer.decode([token for token in row if token != pad]) for row in rows]


def chat_batches(tokenizer, texts, batch, seed=0):
    """Endless batches (input_ids, mask), padded on the right, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    rows = [tokenizer(text)["input_ids"][:WIDTH] for text in texts]
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order) - batch + 1, batch):
            chosen = [rows[i] for i in order[start : start + batch]]
            width = max(map(len, chosen))
            ids = torch.full((batch, width), tokenizer.pad_token_id)
            for line, row in zip(ids, chosen, strict=True):
                line[: len(row)] = torch.tensor(row)
            yield ids, ids != tokenizer.pad_token_id


def chat_loss(adapted, ids, mask, generator):
    """Kullback-Leibler divergence of the adapted model's words from the original's, in nats.

    adapted: a PEFT model; (b, t) ids and mask. Of all positions POSITIONS are drawn.
    """
    model = adapted.get_base_model()
    places = mask.nonzero()
    places = places[torch.randperm(len(places), generator=generator)[:POSITIONS]]

    def words():
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.get_decoder()(input_ids=ids).last_hidden_state
            return log_softmax(model.lm_head(hidden[places[:, 0], places[:, 1]]).float(), dim=-1)

    with torch.no_grad(), adapted.disable_adapter():
        original = words()
    return kl_div(words(), original, log_target=True, reduction="batchmean")
