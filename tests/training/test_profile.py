"""`train --profile`: a step's time by kernel, phase and sphere, as a table and as a trace."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from cllm_spheres.kernels.trace import KINDS
from cllm_spheres.model.dtypes import usable
from cllm_spheres.training import session
from cllm_spheres.training.launch import Launch
from tests.runs import TINY, finished

DTYPES = ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(usable("auto") == "fp32", reason="no bfloat16 here"))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_profiled_step_tells_where_its_time_went(corpus, tmp_path, dtype):
    options = TINY | dict(steps=14, spheres=4, workers=2, dtype=dtype, eval_every=14)
    plan = session.new_run(corpus, options, run=tmp_path / "run", file=None)
    outcome = finished(Launch({"dtype": dtype}).obey(replace(plan, profile=True)))
    assert outcome.code == 0, outcome.message
    assert outcome.event("profile")["step"] >= 10
    trace = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert trace["otherData"] == {"step": 10}
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["tid"] for e in events} == {0, 1}
    assert {e["args"]["sphere"] for e in events if e["cat"] == "kernel"} == {0, 1, 2, 3}
    assert {e["name"] for e in events} <= set(KINDS)
    assert {
        "gather",
        "update",
        "wait",
        "attention",
        "attention backward",
        "head",
        "linear dw" if dtype == "bf16" else "linear backward",
    } <= {e["name"] for e in events}
    for worker in (0, 1):  # one interval ends where the next begins: nothing is left out, nothing counted twice
        mine = sorted((e["ts"], e["dur"]) for e in events if e["tid"] == worker)
        assert all(a + d <= b + 1e-3 for (a, d), (b, _) in pairwise(mine))
    text = (tmp_path / "run" / "profile.md").read_text()
    assert text.startswith("# Step 10: where the time of 2 workers went\n")
    assert "| attention backward | 4 |" in text  # one layer, four spheres


def test_bits_are_the_same_with_and_without_a_trace_which_is_made_only_where_it_is_asked_for(corpus, tmp_path):
    bits = []
    for profile in (False, True):
        plan = session.new_run(corpus, TINY | dict(steps=12), run=tmp_path / str(profile), file=None)
        bits.append(finished(Launch().obey(replace(plan, profile=profile))).bits)
        assert any(plan.run.glob("profile*")) == profile
    assert bits[0] == bits[1]
