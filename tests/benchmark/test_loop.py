"""The descent that every training makes: it goes on where it stopped, its batches go by length."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from optmerge_core.benchmark.training import loop

STEPS = 7


def descent(state=None, until=STEPS):
    """A linear regression by noisy batches, stopped before step `until`: its weight and losses."""
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 2, generator=generator) for _ in range(STEPS)]

    def loss_of(batch):
        if batch is batches[min(until, STEPS - 1)] and until < STEPS:
            raise KeyboardInterrupt
        return (batch @ weight - 1).square().mean()

    losses = loop.descend(
        loss_of, [weight], iter(batches), learning_rate=0.1, steps=STEPS, state=state
    )
    return weight.detach(), losses


def test_an_interrupted_descent_goes_on_to_the_same_end(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "KEPT", 2)
    state = tmp_path / "model.state.pt"
    whole, losses = descent()
    assert loop.spent(state) == 0 == loop.spent(None)
    with pytest.raises(KeyboardInterrupt):
        descent(state, until=5)
    assert [path.name for path in tmp_path.iterdir()] == [state.name]
    assert len(torch.load(state, weights_only=True)["losses"]) == 4 and loop.spent(state) > 0
    resumed, found = descent(state)
    assert found == losses and torch.equal(resumed, whole)


def samples(lengths):
    return [
        SimpleNamespace(image=np.full((2, 2, 3), length % 7), turns=[("q" * length, "a")])
        for length in lengths
    ]


def test_pooled_batches_are_alike_in_length_and_in_no_order():
    given = samples(range(60, 0, -1))
    widths = loop.ByLength(lambda rows: [len(s.turns[0][0]) for s in rows], batch=6)(given)
    assert sorted(sum(widths, [])) == list(range(1, 61))
    assert all(max(width) - min(width) == 5 for width in widths)
    starts = [min(width) for width in widths]
    assert starts not in (sorted(starts), sorted(starts, reverse=True))


def test_a_stream_has_as_many_batches_as_asked_for_whatever_the_pool():
    def draw(task, split, index, level, seed):
        return SimpleNamespace(
            image=np.full((1, 1, 3), index % 5), turns=[("q" * (index % 9), level)], index=index
        )

    def stream(pool):
        levels = dict.fromkeys("ab", 1.0)
        return list(
            loop.batches(
                draw, lambda rows: rows, 10, 3, tasks={"OCR": 1.0}, levels=levels, seed=0,
                workers=0, pool=pool,
            )
        )  # fmt: skip

    single, pooled = stream(1), stream(4)
    assert [len(rows) for rows in single] == [len(rows) for rows in pooled] == [3] * 10
    assert [s.index for rows in single for s in rows] == list(range(30))
    assert sorted(s.index for rows in pooled for s in rows) == list(range(30))
    for rows in single + pooled:
        assert len({s.turns[0][1] for s in rows}) == 1  # a batch has one level
