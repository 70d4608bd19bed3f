"""Threads that measure: each on a processor of its own for a turn, and wherever it likes otherwise."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from vidbench import threads
from vidbench.threads import OwnProcessors

needs_two = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two processors, on Linux"
)


def busy(seconds: float = 0.05) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        sum(range(1000))


@needs_two
def test_threads_that_compute_are_held_apart_for_a_turn_and_no_longer() -> None:
    allowed = os.sched_getaffinity(0)
    matrix = torch.randn(400, 400)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    idle = threading.Event()
    sleeper = threading.Thread(target=idle.wait)
    sleeper.start()
    try:
        places = OwnProcessors(lambda: [matrix @ matrix for _ in range(50)])
        assert len(places.places) == 2
        assert threading.get_native_id() in places.places
        assert sleeper.native_id not in places.places
        with places:
            held = [os.sched_getaffinity(thread) for thread in places.places]
            assert [len(processors) for processors in held] == [1, 1]
            assert held[0] != held[1]
        assert all(os.sched_getaffinity(thread) == allowed for thread in places.places)
    finally:
        idle.set()
        sleeper.join()
        torch.set_num_threads(before)


@needs_two
def test_a_single_thread_goes_where_it_likes() -> None:
    with OwnProcessors(busy) as places:
        assert not places.places
        assert os.sched_getaffinity(0) == places._allowed


def test_more_threads_than_processors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([{}, {11: 1.0, 12: 0.9, 13: 0.8, 14: 0.01}])
    monkeypatch.setattr(threads, "_seconds_used", lambda: next(used))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert not OwnProcessors(lambda: None).places


def test_cores_come_before_their_second_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([{14: 5.0}, {11: 1.0, 12: 0.9, 13: 0.8, 14: 5.05}])
    monkeypatch.setattr(threads, "_seconds_used", lambda: next(used))
    monkeypatch.setattr(threads, "_siblings", lambda processor: {processor // 2 * 2, processor // 2 * 2 + 1})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert OwnProcessors(lambda: None).places == {11: 0, 12: 2, 13: 4}


def test_a_thread_that_has_ended_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise ProcessLookupError

    used = iter([{}, {11: 1.0, 12: 0.9}])
    monkeypatch.setattr(threads, "_seconds_used", lambda: next(used))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", gone, raising=False)
    with OwnProcessors(lambda: None) as places:
        assert len(places.places) == 2
