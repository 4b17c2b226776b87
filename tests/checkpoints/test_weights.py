"""One type for weights of every origin."""

import torch

from optmerge_core import open_checkpoint
from optmerge_core.checkpoints.weights import InMemory, Renamed, Weights, as_weights


def test_a_state_dict_says_what_its_folder_says(tiny):
    stored = open_checkpoint(tiny.base)
    held = as_weights(dict(stored))
    assert isinstance(held, InMemory) and as_weights(stored) is stored and as_weights(held) is held
    assert list(held) == list(stored) and held.shapes() == stored.shapes()
    for name in stored:
        assert (held.dtype(name), held.nbytes(name)) == (stored.dtype(name), stored.nbytes(name))
        assert held.nbytes(name) == held[name].nbytes
    assert held.config() == {} and held.folder is None
    assert held.provenance() == {"revision": None, "source": None, "sha256": {}}


def test_nothing_but_indexing_reads():
    class Unread(Weights):
        _names = ("a", "b")

        def __getitem__(self, name):
            raise AssertionError(f"{name} was read")

        def shape(self, name):
            return (2, 3)

        def dtype(self, name):
            return torch.float16

    weights = Renamed(Unread(), {"mine": "a"})
    assert list(weights) == ["mine"] and len(weights) == 1 and "a" not in weights
    assert weights.shapes() == {"mine": (2, 3)} and weights.nbytes("mine") == 12
    assert weights.own_name("mine") == "a" and weights.own_name("mine") in weights.weights
    assert weights.task_vector("mine") is None and weights.changes is None


def test_another_naming_keeps_an_adapter_s_exact_task_vectors():
    class Exact(InMemory):
        changes = ("a",)

        def task_vector(self, name, base_tensor=None):
            return torch.full((2,), 5.0 if name == "a" else 0.0)

    weights = Renamed(Exact({"a": torch.ones(2), "b": torch.ones(2)}), {"x": "a", "y": "b"})
    assert weights.changes == {"x"} and weights.task_vector("x").tolist() == [5.0, 5.0]
    assert weights.streamed(["x", "y"]) == []
