"""What a run is computed in: what is chosen, what is said, what a resume elsewhere does, and that it learns."""

from __future__ import annotations

import json
import tomllib

import numpy as np
import pytest

import cllm_spheres as cs
from cllm_spheres.model import dtypes
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.program import program
from cllm_spheres.model.shape import Shape
from tests.check import assert_close
from tests.faults.amounts import amount
from tests.naive import naive_logits
from tests.runs import TINY, char_corpus, command, corpus, resume, train_whole, words  # noqa: F401

HAS_BF16 = pytest.mark.skipif(dtypes.usable("bf16") != "bf16", reason="no AVX512-BF16 here")
HAS_AMX = pytest.mark.skipif(not dtypes.describe("bf16").endswith("AMX"), reason="no AMX here")
SHORT = TINY | dict(steps=8, eval_every=8, eval_tokens=200)


@pytest.fixture
def without_bf16(monkeypatch):
    monkeypatch.setenv("CLLM_SPHERES_BF16", "none")


@pytest.fixture(scope="module")
def half(corpus, tmp_path_factory):  # noqa: F811
    """A run in bfloat16 that has ended. Do not change it."""
    return train_whole(corpus, tmp_path_factory.mktemp("half") / "run", **SHORT | {"dtype": "bf16"})


# --- what is chosen ---


@HAS_BF16
def test_auto_is_bfloat16_where_the_cpu_has_it():
    assert [dtypes.usable(dtype) for dtype in ("auto", "fp32", "bf16")] == ["bf16", "fp32", "bf16"]
    assert dtypes.describe("auto") == dtypes.describe("bf16") in ("bfloat16 on AMX", "bfloat16 on AVX-512")
    assert dtypes.describe("fp32") == "float32"


def test_auto_is_float32_for_narrow_models_on_avx512(monkeypatch):
    for backend, chosen in (("avx512", ["fp32", "bf16"]), ("amx", ["bf16", "bf16"]), (None, ["fp32", "fp32"])):
        monkeypatch.setattr(dtypes, "bf16_backend", lambda backend=backend: backend)
        assert [dtypes.choose("auto", width) for width in (dtypes.NARROW - 1, dtypes.NARROW)] == chosen
        assert [dtypes.choose(dtype, 8) for dtype in ("fp32", "bf16")] == ["fp32", dtypes.usable("bf16")]


def test_float32_stands_in_where_the_cpu_has_no_bfloat16(without_bf16):
    assert {dtypes.usable(dtype) for dtype in ("auto", "fp32", "bf16")} == {"fp32"}
    assert dtypes.describe("auto") == dtypes.describe("fp32") == "float32"
    assert dtypes.describe("bf16") == "float32, as this CPU has no bfloat16 arithmetic"


@HAS_AMX
def test_amx_is_left_alone_where_that_is_asked_for(monkeypatch):
    monkeypatch.setenv("CLLM_SPHERES_BF16", "avx512")
    assert dtypes.describe("bf16") == "bfloat16 on AVX-512"


@pytest.mark.parametrize("dtype", ["auto", "fp8", ""])
def test_only_a_dtype_that_has_kernels_has_a_program(dtype):
    layout = Layout(Shape(vocab_size=5, block_size=4, layers=1, heads=1, width=4, ff_width=4))
    for ask in (
        lambda: program(layout, dtype, largest_shard=1),
        lambda: dtypes.packing(layout, dtype),
        lambda: dtypes.load(dtype),
    ):
        with pytest.raises(ValueError, match=f"no kernels for dtype '{dtype}', only for fp32 and bf16"):
            ask()


# --- what a run says and writes ---


def run_by_command(corpus, path, dtype):  # noqa: F811
    """The lines of the console script, and the run's config.toml and first event."""
    options = {**SHORT, "dtype": dtype, "run": path}
    if dtype is None:
        del options["dtype"]
    done = command("train", corpus, *words(options))
    assert done.returncode == 0, done.stderr
    with (path / "metrics.jsonl").open() as file:
        events = [record for record in map(json.loads, file) if record["kind"] == "event"]
    return done.stdout.splitlines(), tomllib.loads((path / "config.toml").read_text()), events[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", None])
def test_auto_is_the_default_and_stands_resolved_in_config_toml(corpus, tmp_path, dtype):  # noqa: F811
    lines, config, event = run_by_command(corpus, tmp_path / "run", dtype)
    assert config["dtype"] == event["dtype"] == event["config"]["dtype"] == dtypes.choose("auto", TINY["width"])
    assert f"; {dtypes.describe(config['dtype'])}; 8 steps" in lines[0]


@pytest.mark.slow
def test_auto_is_resolved_to_float32_where_there_is_no_bfloat16(corpus, tmp_path, without_bf16):  # noqa: F811
    lines, config, event = run_by_command(corpus, tmp_path / "run", "auto")
    assert config["dtype"] == event["dtype"] == "fp32"
    assert "; float32; 8 steps" in lines[0]


@pytest.mark.slow
def test_bf16_where_there_is_none_trains_in_float32_and_says_so(corpus, tmp_path, without_bf16):  # noqa: F811
    lines, _, event = run_by_command(corpus, tmp_path / "run", "bf16")
    assert "; float32, as this CPU has no bfloat16 arithmetic; 8 steps" in lines[0]
    assert event["dtype"] == "fp32" and event["config"]["dtype"] == "bf16"
    straight = train_whole(corpus, tmp_path / "straight", **SHORT)
    ours, theirs = cs.load(tmp_path / "run").parameters, cs.load(straight.run).parameters
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


# --- a resume elsewhere ---


@pytest.mark.slow
@HAS_BF16
def test_a_resume_where_there_is_no_bfloat16_says_what_differs_and_goes_on(corpus, tmp_path, monkeypatch):  # noqa: F811
    stopped = train_whole(corpus, tmp_path / "run", **SHORT | {"dtype": "bf16", "stop_at": 4})
    monkeypatch.setenv("CLLM_SPHERES_BF16", "none")
    refused = command("train", "--resume", "--exact", "--run", stopped.run)
    assert refused.returncode == 2 and "--exact: the numerics are not those of" in refused.stderr
    assert "dtype bf16 -> fp32" in refused.stderr
    assert "Without --exact the run goes on, with other bits." in " ".join(refused.stderr.split())
    assert stopped.of("step")[-1]["step"] == 4
    resumed = resume(stopped.run)
    assert resumed.code == 0, resumed.message
    event = resumed.event("fingerprint")
    # AVX-512 may stand behind both dtypes: then the backend is the same word.
    assert "dtype bf16 -> fp32" in event["differences"]
    assert {difference.split()[0] for difference in event["differences"]} <= {"dtype", "backend"}
    assert resumed.of("event")[-1]["reason"] == "done" and resumed.of("step")[-1]["step"] == 8
    assert (resumed.event("start")["dtype"], resumed.of("event")[-1]["event"]) == ("bf16", "end")
    assert {e["dtype"] for e in resumed.of("event") if e["event"] == "resume"} == {"fp32"}


@pytest.mark.slow
@HAS_BF16
def test_a_resume_in_the_same_bfloat16_is_exact(half, corpus, tmp_path):  # noqa: F811
    stopped = train_whole(corpus, tmp_path / "run", **SHORT | {"dtype": "bf16", "stop_at": 4})
    resumed = resume(stopped.run, exact=True, workers=1)
    assert resumed.code == 0, resumed.message
    assert (resumed.curve, resumed.files) == (half.curve, half.files)
    assert "fingerprint" not in [e["event"] for e in resumed.of("event")]


@pytest.mark.slow
@HAS_AMX
def test_avx512_trains_too_and_is_an_arithmetic_of_its_own(half, corpus, tmp_path, monkeypatch):  # noqa: F811
    stopped = train_whole(corpus, tmp_path / "stopped", **SHORT | {"dtype": "bf16", "stop_at": 4})
    monkeypatch.setenv("CLLM_SPHERES_BF16", "avx512")
    one, other = (
        train_whole(corpus, tmp_path / str(workers), **SHORT | {"dtype": "bf16", "workers": workers})
        for workers in (1, 4)
    )
    assert one.bits == other.bits
    # The same operands, added in another order. Measured over eight seeds: 2e-9 of a loss in the first step; then a sum
    # that differs in its last bit rounds to another bfloat16 here and there, and eight steps make 1e-5 of it at most.
    ours, theirs = ([r[1] for r in run.curve] for run in (one, half))
    assert np.isclose(ours[0], theirs[0], rtol=1e-7, atol=0) and np.allclose(ours, theirs, rtol=1e-4, atol=0)
    assert ours != theirs
    assert "backend amx -> avx512" in resume(stopped.run, exact=True).message


# --- what comes of it ---


@HAS_BF16
def test_what_was_trained_in_bfloat16_is_loaded_and_computed_in_float32(half):
    model = cs.load(half.run)
    for name, tensor in model.parameters.items():
        assert tensor.dtype == np.float32, name
        if tensor.ndim == 2:  # the weights are float32 themselves: few have a bfloat16's sixteen zeros
            assert (tensor.view(np.uint32) & 0xFFFF != 0).mean() > 0.99, name
    config = half.config
    shape = Shape(
        config.vocab_size, config.block_size, config.layers, config.heads, config.width, config.ff_width, config.bias
    )
    ids = np.arange(8, dtype=np.int32)[None]
    # float32's tolerance, 1e-5; bfloat16 rounds every operand by up to 4e-3
    assert_close(model.logits(ids[0]), naive_logits(shape, model.parameters, ids)[0])
    assert len(model.generate("ab", tokens=5, seed=1)) > 0


# Measured over six seeds, each in both dtypes: the mean loss of the last 30 of 150 steps, 3.8 after 4.2 at first, has a
# standard deviation of 0.030 from seed to seed; the two dtypes of one seed differ by 0.0014 to 0.026, up as often as
# down, with a deviation of 0.013. The mean over two or three seeds must lie within one deviation of a seed.
SEEDS, MARGIN = amount((0, 1), (0, 1, 2)), 0.03


@pytest.mark.slow
@HAS_BF16
def test_bfloat16_learns_as_float32_does(char_corpus, tmp_path):  # noqa: F811
    options = dict(
        layers=2, heads=2, width=32, ff_width=64, block_size=16, batch_size=16, spheres=4, workers=2, steps=150,
        lr=1e-2, eval_every=150, eval_tokens=2000,
    )  # fmt: skip
    ends, validated = {}, {}
    for dtype in ("fp32", "bf16"):
        runs = [
            train_whole(char_corpus, tmp_path / f"{dtype}{seed}", **options, seed=seed, dtype=dtype) for seed in SEEDS
        ]
        ends[dtype] = np.mean([[r["loss"] for r in run.of("step")[-30:]] for run in runs])
        validated[dtype] = np.mean([run.evaluations[-1][1] for run in runs])
        assert ends[dtype] < np.mean([run.of("step")[0]["loss"] for run in runs]) - 0.25
    assert abs(ends["bf16"] - ends["fp32"]) < MARGIN
    assert abs(validated["bf16"] - validated["fp32"]) < MARGIN
