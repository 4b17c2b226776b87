"""Questions to the 135 M model of the study `smol`: how many a second, and how many there could be.

`python tests/benchmarks/answers.py [--questions 12] [--base data/benchmark/smol/base]` asks so many
shipped questions a task, two about each picture, by the study's evaluator and by transformers'
`generate` in batches of questions of one length. The floor is the products of the layers for every
picture, question and answer, each token once, and of the head for every token that is said (2 flops
a parameter, attention left out), at the measured matmul rate. Where the base has not been built, a
random tower stands in for its own: it says other and longer things. results.csv keeps the times.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from floors import best_seconds, matmul_rate, record, show

from optmerge_core.benchmark.evaluator import EmbeddedEvaluator, SmolEvaluator
from optmerge_core.benchmark.models.smol import build_model, build_processor
from optmerge_core.evaluation.questions import load_split

COUNT = 12  # questions of a task; another number is a try and not recorded


class ByLength(EmbeddedEvaluator):
    """The same questions, asked as the tiny families are: by `generate`."""

    max_new_tokens, batch_size = SmolEvaluator.max_new_tokens, SmolEvaluator.batch_size


def write_random_base(folder):
    processor = build_processor()
    build_model(processor.tokenizer).half().save_pretrained(folder)
    processor.save_pretrained(folder)


def floor_flops(evaluator, answers):
    """Products of the linear layers and of the head, no token computed twice or for nothing."""
    model, tokenizer = evaluator.model, evaluator.tokenizer
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters() if p.ndim == 2)
    limit = evaluator.max_new_tokens
    said = [min(len(ids) + 1, limit) for ids in tokenizer(list(answers))["input_ids"]]
    read = len(evaluator._start) * len(evaluator._features) + sum(map(len, evaluator._questions))
    spoken = sum(said) - len(said)  # an answer's last token is not read
    return 2 * layers * (read + spoken) + 2 * model.lm_head.weight.numel() * sum(said)


def main(questions, base):
    data = load_split("data/benchmark/smol/questions", "validation", questions)
    with TemporaryDirectory() as folder:
        trained = Path(base, "config.json").is_file()
        if not trained:
            write_random_base(base := folder)
        ours, other = SmolEvaluator(base, data), ByLength(base, data)
        answers = ours.answer()["prediction"]
        count = f"{len(data)} questions about {len(ours._features)} pictures"
        row = {
            "case": f"smol, {count}{'' if trained else ', random tower'}",
            "floor (s)": floor_flops(ours, answers) / matmul_rate(),
            "ours (s)": best_seconds(ours.answer, repeats=2),
            "other": "generate, batches of one length",
            "other (s)": best_seconds(other.answer, repeats=1),
        }
    if questions == COUNT:
        record([row])
    for name in ("floor", "ours", "other"):
        print(f"{name}: {len(data) / row[f'{name} (s)']:.1f} questions a second")
    show("answers", [row])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=COUNT, help="of a task")
    parser.add_argument("--base", default="data/benchmark/smol/base")
    main(**vars(parser.parse_args()))
