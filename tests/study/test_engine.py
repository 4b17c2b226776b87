"""The engine's own decisions, by a Ray that is none: where a task goes, again, and when it ends."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from optmerge_core.study import engine
from optmerge_core.study.engine import RETRIES, Done, Failed, Task, run_tasks


class Machines:
    """What the engine asks of Ray: a task is done when it is waited for, the first started first.

    means: name -> (cores, GPUs, bytes). What is started anywhere goes to each in turn. On a full
    one tasks fail; what a hanging one gets is never ready, and there are others for its tasks only
    once the engine has waited in vain.
    """

    def __init__(self, *, full=(), hanging=(), **means):
        self.means, self.full, self.hanging = means, full, hanging
        self.asked, self.places, self.cancelled, self.turn = [], {}, [], 0
        affinity = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
        self.util = SimpleNamespace(scheduling_strategies=affinity)
        self.exceptions = SimpleNamespace(RayTaskError=KeyError, RayError=LookupError)

    def nodes(self):
        names = ("CPU", "GPU", "memory")
        return [
            {"NodeID": name, "Alive": True, "Resources": dict(zip(names, means, strict=True))}
            for name, means in self.means.items()
        ]

    def cluster_resources(self):
        return {"GPU": sum(gpus for _, gpus, _ in self.means.values())}

    def remote(self, function):
        assert function is engine._call
        return self

    def options(self, **asked):
        def start(function, arguments):
            place = asked["scheduling_strategy"]
            if place == "SPREAD":
                place = list(self.means)[self.turn % len(self.means)]
                self.turn += 1
            reference = len(self.asked)
            self.asked.append((arguments[0], asked))
            self.places[reference] = place
            return reference

        return SimpleNamespace(remote=start)

    def wait(self, references, timeout):
        ready = [x for x in references if self.places[x] not in self.hanging][:1]
        if not ready:
            self.lost()
        return ready, [x for x in references if x not in ready]

    def lost(self):
        """What happens while the engine waits in vain."""

    def get(self, reference):
        place = self.places[reference]
        return Failed(f"{place} is full", place) if place in self.full else Done(place, 0.1)

    def cancel(self, reference, force):
        assert force
        self.cancelled.append(self.places[reference])


@pytest.fixture
def use(monkeypatch):
    def use(machines):
        @contextmanager
        def connected(address):
            yield machines

        monkeypatch.setattr(engine, "connected", connected)
        return machines

    return use


def tasks(count, memory=10):
    return [Task("module:name", (number,), float(number), memory) for number in range(count)]


def test_the_largest_start_first_with_what_they_need(use):
    machines = use(Machines(a=(2, 0, 100), b=(2, 0, 100)))
    done = run_tasks(tasks(5), "auto", "testing")
    assert [number for number, _ in machines.asked] == [4, 3, 2, 1, 0]
    assert [x.worker for x in done] == ["a", "b", "a", "b", "a"]
    for _, asked in machines.asked:
        wanted = {"num_cpus": 1, "num_gpus": 0.0, "memory": 10, "max_retries": RETRIES}
        assert asked == wanted | {"scheduling_strategy": "SPREAD"}


def test_what_fails_on_a_full_disk_goes_to_a_machine_where_it_has_not_failed(use):
    machines = use(Machines(full="a", a=(1, 0, 100), b=(1, 0, 100)))
    done = run_tasks(tasks(6), "auto", "testing")
    assert [asked["scheduling_strategy"] for _, asked in machines.asked[6:]] == ["b"] * 3
    assert [number for number, _ in machines.asked[6:]] == [5, 3, 1]  # which a had got
    assert {x.worker for x in done} == {"b"}


def test_what_fails_everywhere_ends_with_its_reason(use):
    machines = use(Machines(full="ab", a=(1, 0, 100), b=(1, 0, 100)))
    with pytest.raises(OSError, match="^[ab] is full$"):
        run_tasks(tasks(1), "auto", "testing")
    assert len(machines.asked) == 1 + RETRIES
    assert machines.asked[1][1]["scheduling_strategy"] == "b"  # after a
    assert machines.asked[2][1]["scheduling_strategy"] == "SPREAD"  # after both


@pytest.mark.parametrize(
    ("means", "device", "text"),
    [
        ((0, 0, 100), "cpu", "no machine there has a core, 0.0 GB of memory, which"),
        ((1, 0, 9), "auto", "no machine there has a core, 0.0 GB of memory, which"),
        ((1, 0, 100), "cuda", "no machine there has a core, 0.0 GB of memory and a GPU, which"),
        ((1, 1, 100), "cuda:1", "--device cuda:1: on a cluster every task has a GPU of its own"),
        ((1, 1, 100), "cuda:all", "on a cluster every task has a GPU of its own; give cuda"),
    ],
)
def test_what_no_machine_can_do_is_refused_before_anything_starts(use, means, device, text):
    machines = use(Machines(a=means))
    with pytest.raises(ValueError, match=text):
        run_tasks(tasks(2), "auto", "testing", device)
    assert machines.asked == []


@pytest.mark.parametrize(
    ("device", "gpus", "asked"),
    [("cuda", 2, 1.0), ("auto", 2, 1.0), ("auto", 0, 0.0), ("cpu", 2, 0.0)],
)
def test_tasks_ask_for_gpus_where_they_compute_on_one(use, device, gpus, asked):
    """All alike: with auto none computes on the CPU while others have a GPU."""
    machines = use(Machines(a=(1, 0, 100), b=(1, gpus, 100)))
    run_tasks(tasks(4), "auto", "testing", device)
    assert {x["num_gpus"] for _, x in machines.asked} == {asked}


def test_what_hangs_is_given_to_others_too_and_cancelled_at_the_end(use):
    machines = use(Machines(hanging="a", a=(1, 0, 100), b=(1, 0, 100)))
    done = run_tasks(tasks(4), "auto", "testing")
    assert {x.worker for x in done} == {"b"}
    assert len(machines.asked) > 4 and set(machines.cancelled) == {"a"}


def test_when_all_machines_are_gone_it_ends(use):
    machines = use(Machines(hanging="a", a=(1, 0, 100)))
    machines.lost = machines.means.clear
    with pytest.raises(ValueError, match="no machine there has a core"):
        run_tasks(tasks(2), "auto", "testing")


@pytest.mark.parametrize("kind", [RuntimeError, LookupError])
def test_a_cluster_that_cannot_be_joined(kind, monkeypatch):
    """Ray's own message has many lines; ours has one, with the remedies."""

    def init(**_):
        raise kind("InvalidAuthToken:\n  missing")

    nobody = SimpleNamespace(
        is_initialized=lambda: False, init=init, exceptions=SimpleNamespace(RayError=LookupError)
    )
    monkeypatch.setitem(sys.modules, "ray", nobody)
    said = r"^--cluster auto: no cluster of Ray there \(InvalidAuthToken: missing\); .* token wants"
    with pytest.raises(ConnectionError, match=said) as caught:
        run_tasks([Task("a:b", (), 1, 1)], "auto", "x")
    assert "\n" not in str(caught.value)
