"""The same bits for any number of workers, and across a stop and a resume: losses, weights and moments, with `==`."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.model import dtypes
from tests.faults.amounts import amount
from tests.runs import initial_weights, resume, train_whole

# 63 spheres; a few more than 60 blocks of parameters, so that nearly every one of 63 workers has a span. The
# gradient's norm is about 1 at first: with this clip some steps are clipped.
MODEL = dict(layers=2, heads=3, width=96, ff_width=384, block_size=8, batch_size=63, spheres=63, steps=30, seed=5)
RUNS = {
    "adamw": dict(MODEL, optimizer="adamw", clip=0.5, lr=3e-3),
    "sgd": dict(MODEL, optimizer="sgd", clip=0.5, lr=0.3),
    "adamw bf16": dict(MODEL, optimizer="adamw", clip=0.5, lr=3e-3, dtype="bf16"),
    "crystalline": dict(MODEL, loss="crystalline", init="lattice", clip=0.5, lr=3e-3),
    "crystalline bf16": dict(MODEL, loss="crystalline", alpha=0.3, clip=0.5, lr=3e-3, dtype="bf16"),
}
HAS_BF16 = pytest.mark.skipif(dtypes.usable("bf16") != "bf16", reason="no AVX512-BF16 here")
NAMES = [
    "adamw", "sgd", pytest.param("adamw bf16", marks=HAS_BF16), "crystalline",
    pytest.param("crystalline bf16", marks=HAS_BF16),
]  # fmt: skip
DTYPES = ["fp32", pytest.param("bf16", marks=HAS_BF16)]
# Nothing here is a multiple of anything: 130 sequences over 63 spheres, 65 characters, a width of 36, heads of 12.
ODD = dict(
    layers=2, heads=3, width=36, ff_width=50, block_size=9, batch_size=130, spheres=63, steps=12, eval_every=5,
    eval_tokens=700, clip=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """trained(name, workers): one of RUNS, trained once."""
    made = {}

    def get(name, workers):
        if (name, workers) not in made:
            run = tmp_path_factory.mktemp(name) / "run"
            made[name, workers] = train_whole(corpus, run, **RUNS[name], workers=workers)
        return made[name, workers]

    return get


@pytest.fixture(scope="module")
def odd(char_corpus, tmp_path_factory):
    """odd(dtype): ODD with biases and five workers, trained once."""
    made = {}

    def get(dtype="fp32"):
        if dtype not in made:
            run = tmp_path_factory.mktemp("odd") / "run"
            made[dtype] = train_whole(char_corpus, run, **ODD, workers=5, dtype=dtype)
        return made[dtype]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers"),
    [
        pytest.param(name, workers, marks=HAS_BF16 if name.endswith("bf16") else ())
        for name in RUNS
        # the other short ones leave one worker to AdamW in float32, and two to the resumes below
        for workers in ((1, 2, 7) if name == "adamw" else amount((7,), (1, 2, 7)))
    ],
)
def test_losses_and_weights_do_not_depend_on_the_number_of_workers(trained, name, workers):
    assert trained(name, workers).bits == trained(name, 63).bits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("adamw", 7, 63), ("sgd", 63, 2), ("crystalline", 2, 63), pytest.param("adamw bf16", 2, 7, marks=HAS_BF16),
        pytest.param("crystalline bf16", 63, 2, marks=HAS_BF16),
    ],
)  # fmt: skip
def test_a_resume_with_other_workers_that_keep_less_ends_in_the_same_bits(
    trained, corpus, tmp_path, name, before, after
):
    stopped = train_whole(corpus, tmp_path / "run", **RUNS[name], workers=before, stop_at=13)
    assert [r["step"] for r in stopped.of("step")] == list(range(1, 14))
    mode = "cheap" if "sgd" in name or "bf16" in name else "block"
    resumed = resume(tmp_path / "run", workers=after, recompute=mode)
    assert resumed.code == 0, resumed.message
    assert resumed.event("resume")["from_step"] == 13
    assert "computed again to save memory" in resumed.event("resume")["message"]
    assert resumed.event("resume")["dtype"] == RUNS[name].get("dtype", "fp32")
    assert [e["workers"] for e in resumed.of("event") if e["event"] in ("start", "resume")] == [before, after]
    assert (resumed.curve, resumed.files) == (trained(name, 63).curve, trained(name, 63).files)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_these_runs_clip_and_learn(trained, name):
    steps = trained(name, 63).of("step")
    assert [r["step"] for r in steps] == list(range(1, 31))
    assert any(r["clipped_norm"] < r["grad_norm"] for r in steps)
    assert any(r["clipped_norm"] == r["grad_norm"] for r in steps)
    # the first loss is that of guessing among 257 ids; guessing among the 64 characters that occur is better
    assert steps[0]["cross_entropy"] > 5.4 and np.mean([r["cross_entropy"] for r in steps[-5:]]) < np.log(64)
    assert all((r["loss"] == r["cross_entropy"]) == (not name.startswith("crystalline")) for r in steps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_depends_on_the_workers_where_no_size_is_round(odd, char_corpus, tmp_path, dtype):
    eleven = train_whole(char_corpus, tmp_path / "run", **ODD, workers=11, dtype=dtype)
    assert [step for step, *_ in eleven.evaluations] == [0, 5, 10, 12]
    assert eleven.bits == odd(dtype).bits


@pytest.mark.slow
@HAS_BF16
def test_the_dtypes_have_bits_of_their_own_and_losses_in_common(odd):
    single, half = odd("fp32"), odd("bf16")
    assert single.files != half.files
    # Twelve steps from the same weights: bfloat16 was measured to move a loss by 0.011 % and less.
    for a, b in zip(single.curve, half.curve, strict=True):
        assert a[1] != b[1] and abs(a[1] - b[1]) < 1e-3 * a[1]


@pytest.mark.slow
def test_evaluations_in_between_change_nothing(odd, char_corpus, tmp_path):
    other = train_whole(char_corpus, tmp_path / "run", **ODD | {"eval_every": 12}, workers=2)
    assert [step for step, *_ in other.evaluations] == [0, 12]
    assert (other.curve, other.files) == (odd().curve, odd().files)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_biases_and_with_dropout_a_resume_is_exact_too(char_corpus, tmp_path, dtype):
    options = dict(ODD, bias=False, dropout=0.2, dtype=dtype)
    straight = train_whole(char_corpus, tmp_path / "straight", **options, workers=5)
    train_whole(char_corpus, tmp_path / "run", **options, workers=3, stop_at=7)
    resumed = resume(tmp_path / "run", workers=11)
    assert resumed.code == 0, resumed.message
    assert (resumed.curve, resumed.files) == (straight.curve, straight.files)
    assert resumed.evaluations[-1] == straight.evaluations[-1]
    assert not any(name.endswith("bias") for name in straight.weights())
    assert_moved(straight, char_corpus)


@pytest.mark.slow
def test_another_seed_gives_other_bits_and_every_tensor_moves(odd, char_corpus, tmp_path):
    other = train_whole(char_corpus, tmp_path / "run", **ODD, workers=5, seed=7)
    one = odd()
    assert other.file("model.safetensors") != one.file("model.safetensors")
    assert all(a[1] != b[1] for a, b in zip(other.curve, one.curve, strict=True))
    assert sum(name.endswith("bias") for name in one.weights()) == 2 * 6 + 1
    assert_moved(one, char_corpus)


def assert_moved(outcome, data):
    """Training moved all of every tensor but the rows of characters and positions that have no gradient."""
    before, after = initial_weights(outcome.config, data), outcome.weights()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        moved = (tensor != before[name]).mean()
        assert np.isfinite(tensor).all() and moved > (0.9 if name != "wte.weight" else 0), (name, moved)
