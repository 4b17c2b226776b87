"""The descent that every training makes: it goes on where it stopped, its batches go by length."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from optmerge_core.benchmark.training import loop

STEPS = 7


def descent(state=None, until=STEPS, muon=False):
    """A linear regression by noisy batches, stopped before step `until`: its weight and losses.

    muon: the weight is a product with a matrix that Muon trains.
    """
    matrix = torch.nn.Parameter(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 2, generator=generator) for _ in range(STEPS)]

    def loss_of(batch):
        if batch is batches[min(until, STEPS - 1)] and until < STEPS:
            raise KeyboardInterrupt
        return (batch @ (matrix @ weight) - 1).square().mean()

    losses = loop.descend(
        loss_of, [weight], iter(batches), learning_rate=0.1, steps=STEPS, state=state,
        matrices=[matrix] if muon else (),
    )  # fmt: skip
    return torch.cat([weight[None], matrix]).detach(), losses


@pytest.mark.parametrize("muon", (False, True))
def test_an_interrupted_descent_goes_on_to_the_same_end(tmp_path, monkeypatch, muon):
    monkeypatch.setattr(loop, "KEPT", 2)
    state = tmp_path / "model.state.pt"
    whole, losses = descent(muon=muon)
    assert loop.spent(state) == 0 == loop.spent(None)
    with pytest.raises(KeyboardInterrupt):
        descent(state, until=5, muon=muon)
    assert [path.name for path in tmp_path.iterdir()] == [state.name]
    assert len(torch.load(state, weights_only=True)["losses"]) == 4 and loop.spent(state) > 0
    resumed, found = descent(state, muon=muon)
    assert found == losses and torch.equal(resumed, whole)


def test_muon_steps_a_matrix_by_an_orthogonal_one():
    """The first step's momentum is the gradient; all its singular values become about one."""
    start = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 2.0]])
    matrix, bias = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.zeros(2))
    inputs = torch.tensor([[1.0, 2.0, 3.0], [3.0, -1.0, 0.5]])
    loop.descend(
        lambda _: (inputs @ matrix.T + bias - 1).square().sum(), [bias], iter([None]),
        learning_rate=0.1, steps=1, warmup=0.0, matrices=[matrix],
    )  # fmt: skip
    step = (start - matrix.detach()) / (0.1 * 0.2 * np.sqrt(3))  # the longer side: AdamW's RMS
    assert torch.linalg.svdvals(step).numpy() == pytest.approx(1, abs=0.35)
    assert bias.detach().abs().numpy() == pytest.approx(0.1)


class AsTheyAre(loop.Collate):
    """The samples themselves, told apart in length and order as all are."""

    def __init__(self):
        super().__init__(processor=None)

    def __call__(self, samples):
        return samples


def samples(lengths):
    return [
        SimpleNamespace(image=np.full((2, 2, 3), length % 7), turns=[("q" * length, "a")])
        for length in lengths
    ]


def test_pooled_batches_are_alike_in_length_and_in_no_order():
    given = samples(range(60, 0, -1))
    found = loop.ByLength(AsTheyAre(), batch=6)(given)
    widths = [[len(s.turns[0][0]) for s in rows] for rows in found]
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
                draw, AsTheyAre(), 10, 3, tasks={"OCR": 1.0}, levels=levels, seed=0,
                workers=0, pool=pool,
            )
        )  # fmt: skip

    single, pooled = stream(1), stream(4)
    assert [len(rows) for rows in single] == [len(rows) for rows in pooled] == [3] * 10
    assert [s.index for rows in single for s in rows] == list(range(30))
    assert sorted(s.index for rows in pooled for s in rows) == list(range(30))
    for rows in single + pooled:
        assert len({s.turns[0][1] for s in rows}) == 1  # a batch has one level
