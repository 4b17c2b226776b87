"""Expert Merging (arXiv 2509.25712): how much of each expert, learnt on a few unlabelled questions.

Not data-free: the only method here that sees pictures and questions, of each expert's task a
handful. Their answers are never used. The merged model has θ0 + Σ αk,l τk,l in parameter l, and α
is learnt so that it computes on an expert's questions what that expert computes:

    L(α) = mean_k mean_x [T² KL(expert ‖ merged) + w mean (h − hk)²] + r Σk mean_l |αk,l − α0|

x are expert k's questions, h hidden states after the middle layer; both terms are means over the
tokens where an answer is said: the expert's own greedy one, which stands after the question.
"""

import math
from dataclasses import asdict, dataclass

import pandas as pd
import psutil
import torch
from tqdm.auto import tqdm

from optmerge_core.merging.loop import merge_tensors
from optmerge_core.merging.varied import layer_of
from optmerge_core.methods.contract import check_choice
from optmerge_core.methods.registry import METHODS
from optmerge_core.task_vectors.stack import TaskVectors, apply


def _layer(name):
    """What the names of a decoder layer's parameters begin with; outside of layers its own name."""
    stack, number = layer_of(name)
    return name if number is None else f"{stack}.{number}."


UNITS = {"parameter": str, "layer": _layer}
"""What has a coefficient of each expert: a parameter (a linear layer), or a whole decoder layer."""


PLACES = ("image_token_id", "image_token_index", "video_token_id")
"""Where a model's configuration has the tokens in whose place features stand."""


@dataclass(frozen=True)
class Settings:
    """Of the learning; T, w, r, α0 and the learning rate are the released code's defaults.

    That code learns logit(α) by AdamW in three passes over the samples, eight a step, compares all
    tokens of question and response, whose logits of a large model are gigabytes, and hidden states
    only where layers are named. Here α itself is learnt, and from all samples at each step. What
    tiny models need is in `benchmark/experiments/expert_merging.py`.
    """

    learning_rate: float = 1e-4  # Adam's
    steps: int = 100  # each with all samples
    temperature: float = 3.0  # T
    hidden_weight: float = 0.1  # w
    regularisation: float = 0.1  # r
    initial: float = 0.1  # α0
    unit: str = "parameter"  # or layer: what has a coefficient, see UNITS
    tokens: str = "answer"  # or all: where expert and merged model are compared
    batch_size: int = 1  # questions at once, of one expert and length

    def __post_init__(self):
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")
        for name in ("hidden_weight", "regularisation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number from 0")
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; give a whole number from 1")
        if not math.isfinite(self.initial):
            raise ValueError(f"initial is {self.initial}; give a finite number")
        check_choice("unit", self.unit, UNITS)
        check_choice("tokens", self.tokens, ("answer", "all"))


@dataclass(frozen=True)
class Learnt:
    """Coefficients and how they came about."""

    coefficients: pd.DataFrame
    """(experts, units): αk,l, six decimals; a unit is a part of the names of its parameters"""
    losses: list[float]
    """before the first step and after each"""
    settings: Settings
    samples: dict[str, int]
    """expert -> how many questions it was asked"""

    def weights(self):
        """Of each expert, by filter: what `task_arithmetic` takes as `weights` (`merging.varied`).

        The longest first, as the first counts that is a part of a parameter's name.
        """
        units = sorted(self.coefficients, key=len, reverse=True)
        rows = (self.coefficients.loc[expert] for expert in self.coefficients.index)
        return [[{"filter": unit, "value": float(row[unit])} for unit in units] for row in rows]

    def merged(self, opened):
        """Merged task vectors of an opened study: name -> tensor, at a scaling coefficient of 1."""
        options = {"method": "task_arithmetic", "method_options": {"weights": self.weights()}}
        return merge_tensors(opened.base, opened.experts, opened.names, **options)

    def facts(self):
        """What report and card say of it, as plain data."""
        return {
            "by": "Expert Merging (arXiv 2509.25712)",
            "samples": self.samples,
            "loss": [self.losses[0], self.losses[-1]],
            "settings": asdict(self.settings),
        }


def learn(opened, evaluator, settings=None):
    """Coefficients of an opened study's experts, learnt on the questions of an evaluator: `Learnt`.

    evaluator: of the study's base, for questions as `load_unlabelled` gives them; afterwards its
    model is the base again. A question is its task's, and so is the expert of that name. Memory:
    the model with a gradient of each merging weight, one batch's activations, what experts said
    (logits of their answers), and the task vectors where these fit, which are else read twice a
    step.

    Raises `ValueError` for an expert without questions, and for questions with answers.
    """
    settings = settings or Settings()
    vectors = TaskVectors(opened.base, opened.experts, opened.names, evaluator.device)
    alignment = Alignment(evaluator, _kept(vectors), list(opened.experts), settings)
    try:
        return alignment.learn()
    finally:
        alignment.close()


def _kept(vectors, share=0.4):
    """Task vectors in memory, where they take less than a share of what is free; else as they are.

    On a GPU they are read again: its memory is the model's.
    """
    needed = 4 * len(vectors.experts) * sum(math.prod(vectors.base.shape(n)) for n in vectors)
    fits = vectors.device.type == "cpu" and needed < share * psutil.virtual_memory().available
    return dict(vectors) if fits else vectors


class Alignment:
    """L(α) of an evaluator's model and its gradient, for experts on their own questions.

    task_vectors: name -> (experts, *shape), float32, or float64 to see the gradient's last digits.
    """

    def __init__(self, evaluator, task_vectors, experts, settings):
        self.evaluator, self.task_vectors, self.settings = evaluator, task_vectors, settings
        self.experts, self.model = experts, evaluator.model
        if self.model.dtype == torch.float16:  # whose range gradients leave
            self.model.float()
        of = UNITS[settings.unit]
        self.units = list(dict.fromkeys(map(of, task_vectors)))
        self._unit = {name: self.units.index(of(name)) for name in task_vectors}
        self._rows = self._own_rows()
        self.model.requires_grad_(False)
        self._batches = [
            batch
            for number, rows in enumerate(tqdm(self._rows.values(), "experts", leave=False))
            for batch in self._ask(number, rows)
        ]
        self._parameters = self._merging()
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)

    def _own_rows(self):
        """Expert -> the rows of its questions."""
        samples = self.evaluator.samples
        if "answer" in samples:
            raise ValueError(
                "the questions have answers, which are not to be seen: load_unlabelled leaves them "
                "out"
            )
        rows = {x: (samples["task"] == x).to_numpy().nonzero()[0].tolist() for x in self.experts}
        if missing := [expert for expert, own in rows.items() if not own]:
            found = ", ".join(dict.fromkeys(samples["task"]))
            raise ValueError(
                f"expert {missing[0]} has no question of its own: give each expert some, of the "
                f"task that has its name (found: {found})"
            )
        return rows

    def _merging(self):
        """Name on disk -> the parameter in memory."""
        parameters = dict(self.model.named_parameters())
        return {n: parameters[self.evaluator.memory_name(n)] for n in self.task_vectors}

    def hold(self, weights_of):
        """Let the model have θ0 + Σ wk τk; weights_of: name -> a weight for each expert.

        In the model's own dtype: one in which small steps of the weights are lost is no help.
        """
        merge, base, dtype = METHODS["task_arithmetic"], self.evaluator.base, self.model.dtype

        def held(name):
            merged = merge(self.task_vectors[name], weights=weights_of(name))
            return apply(base[name], merged, 1.0, dtype)

        self.evaluator.hold((name, held(name)) for name in self.task_vectors)

    def close(self):
        """The model is the base again, without gradients."""
        self.model.requires_grad_(False)
        self.evaluator.hold()

    @torch.no_grad()
    def _ask(self, number, rows):
        """An expert's questions in batches of one length: [(inputs, targets)], on the CPU."""
        alone = [float(other == number) for other in range(len(self.experts))]
        self.hold(lambda name: alone)
        groups = {}
        for row in rows:
            inputs, said = self._said(row)
            shapes = [(key, x.shape[1:], x.dtype) for key, x in inputs.items()]
            groups.setdefault((said, *map(str, shapes)), []).append(inputs)
        size = self.settings.batch_size
        parts = [
            (said, group[start : start + size])
            for (said, *_), group in groups.items()
            for start in range(0, len(group), size)
        ]
        for said, part in parts:
            inputs = {key: torch.cat([x[key] for x in part]) for key in part[0]}
            inputs = self.evaluator.seen(inputs)
            targets = [x.cpu() for x in self._computed(inputs, said)]
            share = len(part) / (len(rows) * len(self.experts))
            yield inputs, said, targets, share

    def _said(self, row):
        """What the model takes for a question and its own greedy answer, and that one's tokens."""
        given = self.evaluator.inputs(row).items()
        inputs = {key: x for key, x in given if isinstance(x, torch.Tensor)}
        ids = inputs["input_ids"]
        tokens = self.model.generate(
            **inputs,
            max_new_tokens=self.evaluator.max_new_tokens,
            do_sample=False,
            pad_token_id=self.evaluator.tokenizer.pad_token_id,
        )[:, ids.shape[1] :]
        places = {getattr(self.model.config, name, None) for name in PLACES}
        said = tokens[0].tolist()  # ends where a picture's place is said, which has no features
        end = next((i + 1 for i, token in enumerate(said) if token in places), len(said))
        tokens = tokens[:, :end]
        own = {"input_ids": tokens[:, :-1], "attention_mask": torch.ones_like(tokens[:, :-1])}
        for key, x in inputs.items():
            if x.shape == ids.shape:  # of each token: its number, whether it is there, its kind
                more = own.get(key, torch.zeros_like(tokens[:, :-1])).to(x)
                inputs[key] = torch.cat([x, more], dim=1)
        return inputs, tokens.shape[1]

    def _computed(self, inputs, said):
        """Logits (b, tokens, vocabulary) and hidden states (b, tokens, width) that are compared."""
        outputs = self.model(**inputs, output_hidden_states=True, use_cache=False)
        states = outputs.hidden_states
        if states is None:
            raise ValueError(
                f"{type(self.model).__name__} gives no hidden states; it cannot be aligned"
            )
        last = slice(-said, None) if self.settings.tokens == "answer" else slice(None)
        return outputs.logits[:, last], states[len(states) // 2][:, last]

    def __call__(self, alpha):
        """L and dL/dα of coefficients (experts, units) float64; dL/dαk,l = Σ ⟨dL/dW, τk⟩ over l."""
        self.hold(lambda name: alpha[:, self._unit[name]].tolist())
        total = 0.0
        for inputs, said, targets, share in self._batches:
            computed = self._computed(inputs, said)
            loss = share * difference(computed, targets, self.settings).mean()
            loss.backward()
            total += loss.item()
        gradient = torch.zeros_like(alpha)
        for name, parameter in self._parameters.items():
            stack, grad = self.task_vectors[name].flatten(1), parameter.grad
            if grad is not None:  # an expert of a mixture that no token was sent to has none
                gradient[:, self._unit[name]] += (stack @ grad.flatten().to(stack)).to(gradient)
            parameter.grad = None
        off, rate = alpha - self.settings.initial, self.settings.regularisation / len(self.units)
        return total + rate * off.abs().sum().item(), gradient + rate * off.sign()

    def learn(self):
        """Adam from α0 on: `Learnt`."""
        settings, shape = self.settings, (len(self.experts), len(self.units))
        alpha = torch.full(shape, settings.initial, dtype=torch.float64)
        adam = torch.optim.Adam([alpha], lr=settings.learning_rate)
        losses = []
        for _ in tqdm(range(settings.steps), "coefficients", leave=False):
            loss, alpha.grad = self(alpha)
            losses.append(loss)
            adam.step()
        losses.append(self(alpha)[0])
        table = pd.DataFrame(alpha.numpy().round(6), index=self.experts, columns=self.units)
        counts = {expert: len(rows) for expert, rows in self._rows.items()}
        return Learnt(table, losses, settings, counts)


def difference(computed, targets, settings):
    """T² KL(expert ‖ merged) + w mean (h − hk)² of each question, mean over its tokens: (b,).

    computed, targets: logits (b, tokens, vocabulary) and hidden states (b, tokens, width) of merged
    model and expert; at least float32 is computed in.
    """
    T, like = settings.temperature, computed[0]
    precision = torch.promote_types(like.dtype, torch.float32)
    logits, h, expert_logits, hk = (x.to(like.device, precision) for x in (*computed, *targets))
    merged, expert = (torch.log_softmax(x / T, dim=-1) for x in (logits, expert_logits))
    kl = (expert.exp() * (expert - merged)).sum(-1).mean(-1)
    return T**2 * kl + settings.hidden_weight * (h - hk).square().mean((-2, -1))
