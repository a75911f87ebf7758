"""Records -> RunView: what supersedes what, bounded memory, and no record that makes it raise."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_spheres import events
from cllm_spheres.watch.dashboard import render
from cllm_spheres.watch.series import Series
from cllm_spheres.watch.view import RunView
from tests.watch import fake


def view_of(records: Any) -> RunView:
    view = RunView("amber-otter")
    for record in records:
        view.add(record)
    return view


def resume(from_step: int, time: float) -> events.Record:
    return events.event("resume", f"Resumed at step {from_step}.", step=from_step, time=time, from_step=from_step)


def test_a_series_of_a_million_steps_stays_bounded_and_keeps_its_ends():
    series = Series(capacity=64)
    for step in range(0, 1_000_000, 50):
        series.add(step, float(step))
    points = series.points()
    assert 16 <= len(points) <= 64
    assert points[0][0] < 1_000_000 / 16 and points[-1][0] == 999_950
    assert [p[0] for p in points] == sorted({p[0] for p in points})


def test_a_step_given_again_wins_and_drops_what_came_after_it():
    series = Series()
    for step in range(1, 11):
        series.add(step, float(step))
    series.add(6, 60.0)
    assert series.points() == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 60.0)]


@given(st.lists(st.tuples(st.integers(0, 10**12), st.floats(-1e6, 1e6)), max_size=400), st.integers(2, 40))
def test_a_series_stays_bounded_and_ascending_for_any_order_of_steps(pairs, capacity):
    series = Series(capacity)
    for step, value in pairs:
        series.add(step, value)
        assert len(series) <= capacity
    steps = [p[0] for p in series.points()]
    assert steps == sorted(set(steps)) and len(series.smoothed()) == len(steps)
    assert (series.recent() is None) == (not steps)
    if steps:
        assert series.recent() == pytest.approx(series.smoothed()[-1][1], abs=1e-3)  # sums in another order


def test_the_smoothed_curve_does_not_lag_behind_a_straight_fall():
    series = Series()
    for step in range(200):
        series.add(step, 10.0 - 0.01 * step)
    for (step, mean), (_, value) in list(zip(series.smoothed(), series.points(), strict=True))[20:-20]:
        assert mean == pytest.approx(value), step


def test_a_resume_supersedes_the_steps_and_evaluations_beyond_it():
    view = view_of(fake.records(2, until=700, eval_every=100))
    assert view.current_step == 700 and view.best is not None and view.best[0] == 700
    view.add(resume(450, fake.START + 1e4))
    assert view.current_step == 450 and view.step == {}
    assert max(p[0] for p in view.loss.points()) <= 450
    assert [p[0] for p in view.val.points()] == [100, 200, 300, 400]
    assert view.best[0] == 400 and view.eval == {}
    view.add({"kind": "step", "step": 451, "loss": 9.0, "time": fake.START + 1e4 + 1, "seconds": 1, "tokens": 5})
    assert view.loss.points()[-1] == (451, 9.0) or view.loss.stride > 1
    assert view.current_step == 451 and view.tokens_per_s == 5.0


def test_states_follow_the_records():
    records = list(fake.records(2, steps=40, eval_every=10))
    now = lambda: view.last_time or 0.0  # noqa: E731
    view = RunView()
    assert view.state(0.0) == "starting"
    seen = []
    for record in records:
        view.add(record)
        seen.append(view.state(now()))
    assert [s for i, s in enumerate(seen) if i == 0 or s != seen[i - 1]] == [
        "starting", "running", "evaluating", "running", "evaluating", "running", "evaluating", "running",
        "evaluating", "running", "ended"]  # fmt: skip
    assert view.finished and view.silent_s(now() + 1e6) is None
    view.add(resume(40, now() + 5))
    assert view.state(now()) == "starting" and not view.finished
    view.add(events.event("failed", "It failed.", step=40, time=now() + 6, error="x"))
    assert view.state(now()) == "failed"


def test_a_run_that_stopped_writing_without_an_end_is_silent():
    view = view_of(fake.records(2, until=30))
    assert view.state(view.last_time + 2) == "running"
    assert view.state(view.last_time + 200) == "silent for 200 s"


def test_shares_of_the_phases_sum_to_one_and_rates_are_those_of_the_records():
    view = view_of(fake.records(63, until=500))
    shares = view.shares()
    assert sum(shares.values()) == pytest.approx(1.0) and shares["compute"] == pytest.approx(0.83)
    assert view.tokens_per_s == pytest.approx(64 * 64 / 0.08, rel=0.05)  # fake steps scatter by 10 %
    assert view.eta_s(0.0) == pytest.approx(1500 * 0.08, rel=0.05)


def test_packing_is_a_phase_where_the_records_have_it():
    assert "pack" not in view_of(fake.records(2, until=50)).shares()
    packing = [r | {"pack_s": r["seconds"]} if r["kind"] == "step" else r for r in fake.records(2, until=50)]
    shares = view_of(packing).shares()
    assert shares["pack"] == pytest.approx(0.5) and sum(shares.values()) == pytest.approx(1.0)


def test_left_out_steps_change_no_rate():
    records = list(fake.records(63, until=900))
    thin = [r for r in records if r["kind"] != "step" or r["step"] % 7 == 1 or r["step"] == 900]
    whole, part = view_of(records), view_of(thin)
    assert part.mean_tokens_per_s == pytest.approx(whole.mean_tokens_per_s, rel=1e-6)  # Unix time has 0.2 µs
    assert part.eta_s(0.0) == pytest.approx(whole.eta_s(0.0), rel=0.02)  # other edges of the recent window


def test_the_end_of_the_run_is_stop_at_where_it_lies_ahead():
    view = view_of(fake.records(2, until=5))
    view.facts["stop_at"] = 13
    assert view.target == 13
    view.add(resume(13, fake.START + 99))
    assert view.target == 2000
    view.add(events.event("replan", "", step=13, time=fake.START + 99, steps=3000))
    assert view.target == 3000


@pytest.mark.parametrize("name", ["scaled", "fewer"])
def test_another_number_of_workers_is_known(name):
    view = view_of(fake.records(2, until=5))
    view.add(events.event(name, "Fewer.", step=5, time=fake.START, workers=7))
    assert view.facts["workers"] == 7


def test_that_validation_has_turned_up_is_known_until_a_new_best():
    view = view_of(fake.records(2, until=100, eval_every=50))
    view.add(events.event("turned_up", "Up.", step=100, time=fake.START, best_step=100, best_loss=3.0))
    assert view.turned_up is not None
    view.add({"kind": "eval", "step": 150, "val_loss": 0.5, "time": fake.START})
    assert view.turned_up is None


KEYS = [
    "kind",
    "step",
    "time",
    "loss",
    "lr",
    "grad_norm",
    "clipped_norm",
    "tokens",
    "total_tokens",
    "seconds",
    "tokens_per_s",
    "compute_s",
    "waiting_s",
    "val_loss",
    "perplexity",
    "bits_per_byte",
    "unigram_loss",
    "event",
    "message",
    "from_step",
    "config",
    "steps",
    "spheres",
    "workers",
    "throughput",
    "waiting",
    "state",
    "worker",
    "cpu_percent",
    "memory_bytes",
    "cores",
    "eval_every",
    "stop_at",
    "num_parameters",
    "best_step",
]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 200), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from(["step", "eval", "event", "spheres", *events.EVENTS]), st.just(10**400),
    st.lists(st.one_of(st.none(), st.floats(), st.text(max_size=3)), max_size=200),
    st.dictionaries(st.sampled_from(KEYS), st.one_of(st.integers(), st.text(max_size=3)), max_size=3),
)  # fmt: skip
ANY = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=12)


@given(st.lists(ANY, max_size=15), st.randoms(use_true_random=False), st.integers(20, 130), st.integers(4, 45))
@settings(max_examples=60, deadline=None)
def test_no_record_and_no_order_makes_it_raise(strange, rng: random.Random, width, height):
    records = [*fake.records(rng.choice([2, 63]), until=30, eval_every=7), *strange]
    rng.shuffle(records)
    view = RunView()
    for record in records:
        view.add(record)
    for line in render(view, width, height, now=fake.START + 50):
        assert all("\n" not in segment.text and "\x1b" not in segment.text for segment in line)
