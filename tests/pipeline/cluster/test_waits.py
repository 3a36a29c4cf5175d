"""What a job waits for: which reason is reported, since when, and what counts as progress."""

import pytest

from pipeline.cluster.waits import Waits


def state(units=0, loaded=1, loading_s=(), **actors):
    """The result of `Attempts.state`; an actor is (rounds with work, what it waits for[, seconds of silence])."""
    told = {
        name: {"worked": one[0], "waits_for": one[1], "silent_s": one[2] if len(one) > 2 else 1.0}
        for name, one in actors.items()
    }
    return {"units": {"ok": units}, "loaded": loaded, "loading_s": list(loading_s), "actors": told}


def waits():
    return Waits(now=0.0, open_units=10, load_s=1800.0)


def seen(states, fits=True):
    """What `see` returns after these states, ten seconds apart."""
    watched, wait = waits(), None
    for number, one in enumerate(states):
        wait = watched.see(10.0 * number, one, fits)
    return wait


@pytest.mark.parametrize(
    ("one", "fits", "reason"),
    [
        (state(loaded=0), True, "actor"),
        (state(loaded=0), False, "node"),
        (state(a=(5, "cpu")), True, "cpu"),
        (state(a=(5, "frames")), True, "frames"),
        (state(a=(5, "units"), b=(5, "frames")), True, "frames"),
        (state(a=(5, "units")), True, "units"),
        (state(a=(5, "frames", 61.0)), True, "actor"),
        (state(a=(5, None, 61.0)), False, "node"),
        (state(units=10, a=(5, "units")), True, "rows"),
        (state(loaded=0, loading_s=[1801.0]), True, "actor"),
    ],
)
def test_a_job_in_which_nothing_moves_waits_for_a_reason(one, fits, reason):
    wait = seen([one] * 4, fits)
    assert (wait.reason, wait.seconds, wait.all) == (reason, 30.0, True)


@pytest.mark.parametrize(
    "states",
    [
        [state(units=number, a=(5, "frames")) for number in range(4)],  # rows
        [state(a=(number, "frames")) for number in range(4)],  # pieces and tokens
        [state(a=(5, None))] * 4,  # a long piece
        [state(loading_s=[100.0])] * 4,  # a model
    ],
)
def test_what_gets_on_does_not_wait(states):
    wait = seen(states)
    assert wait is None or not wait.all


def test_actors_that_wait_beside_others_that_compute_are_told_too():
    wait = seen([state(a=(number, None), b=(3, "cpu")) for number in range(4)])
    assert (wait.reason, wait.seconds, wait.all) == ("cpu", 30.0, False)


def test_what_moves_again_begins_anew():
    stands, moves = state(a=(5, "frames")), state(a=(6, "frames"))
    assert seen([stands, stands, moves, moves, moves]).seconds == 20.0
