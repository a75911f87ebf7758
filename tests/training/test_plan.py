"""Options and a machine -> workers, spheres, batch and all other numbers, or a refusal with the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cllm_spheres.config import MAX_TOML_BYTES, PRESETS, Config, merge, read_toml, to_toml
from cllm_spheres.errors import InputError
from cllm_spheres.model.program import RECOMPUTE
from cllm_spheres.spheres.placement import Core
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training import plan
from cllm_spheres.training.soft_targets import DEFAULTS


@pytest.fixture
def resolve(corpus, monkeypatch):
    """resolve(cores=8, memory=..., **options): the configuration of a machine with that many cores."""

    def make(cores=8, memory=10**15, **options):
        monkeypatch.setattr(plan, "usable_cores", lambda: list(range(cores)))
        monkeypatch.setattr(plan, "read_cores", lambda cpus: [Core(cpu, socket=0, cache=0) for cpu in cpus])
        monkeypatch.setattr(plan, "available_memory", lambda: memory)
        config, given = merge(options)
        prepared = Prepared.open(corpus)
        resolved = plan.resolve(config, given, prepared)
        plan.check_memory(plan.make_job(resolved, prepared), resume=False)
        return resolved

    return make


@pytest.mark.parametrize(
    ("cores", "options", "expected"),
    [
        # plain `train`: every core is busy, and up to 6 cores the bits do not depend on the machine
        (1, {}, (1, 6, 12)),
        (8, {}, (8, 8, 12)),
        (12, {}, (12, 12, 12)),
        (63, {}, (63, 63, 63)),
        (500, {}, (156, 156, 156)),
        (2, {"preset": "tiny"}, (2, 4, 4)),
        (8, {"preset": "tiny"}, (8, 8, 8)),
        (8, {"preset": "minimal"}, (2, 2, 2)),
        (32, {"preset": "medium"}, (32, 32, 32)),
        # workers given: where they exceed the spheres, both are raised
        (2, {"workers": 63}, (63, 63, 63)),
        (2, {"workers": 63, "preset": "minimal"}, (63, 63, 63)),
        (2, {"workers": 63, "preset": "gpt2"}, (63, 63, 63)),
        (64, {"workers": 3}, (3, 6, 12)),
        (2, {"workers": 14, "preset": "medium"}, (14, 14, 16)),
        # spheres given
        (8, {"spheres": 4}, (4, 4, 12)),
        (2, {"spheres": 63}, (2, 63, 63)),
        (8, {"spheres": 1}, (1, 1, 12)),
        (8, {"spheres": 1, "preset": "minimal"}, (1, 1, 2)),
        # a batch given: fewer spheres where it is small
        (8, {"batch_size": 4}, (4, 4, 4)),
        (8, {"batch_size": 100}, (8, 8, 100)),
        (63, {"batch_size": 20}, (20, 20, 20)),
        (8, {"batch_size": 1}, (1, 1, 1)),
        (8, {"batch_size": 1, "preset": "minimal"}, (1, 1, 1)),
        # all of them
        (2, {"workers": 5, "spheres": 63, "batch_size": 130}, (5, 63, 130)),
        (2, {"workers": 156, "spheres": 156, "batch_size": 156}, (156, 156, 156)),
    ],
)  # fmt: skip
def test_workers_spheres_and_batch(resolve, cores, options, expected):
    config = resolve(cores, **options)
    assert (config.workers, config.spheres, config.batch_size) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(workers=5, spheres=4), "5 workers are more than --spheres 4.*--spheres 5 or --workers 4"),
        (dict(spheres=13, batch_size=12), "13 spheres are more than --batch-size 12.*--batch-size 13"),
        (dict(workers=3, batch_size=2), "3 spheres are more than --batch-size 2"),
        (dict(workers=63, batch_size=12), "63 spheres are more than --batch-size 12"),
        (dict(workers=0), "--workers 0"),
        (dict(workers=157), "--workers 157.*156"),
        (dict(spheres=0), "--spheres 0"),
        (dict(spheres=157), "--spheres 157.*156"),
        (dict(heads=5), r"--heads 5 does not divide --width 128: 128 = 5 \* 25 \+ 3. Try --heads 4"),
        (dict(block_size=20_000), r"shorter than one block: --block-size 20000 needs 20,001"),
        (dict(steps=10, warmup=11), "--warmup 11 is longer than the run, --steps 10"),
        (dict(lr=1e-3, min_lr=2e-3), "--min-lr 0.002 is above --lr 0.001"),
        (dict(steps=10, epochs=1.0), r"Both steps \(10\) and epochs \(1.0\)"),
        (dict(optimizer="adam"), "--optimizer cannot be 'adam': did you mean 'adamw'"),
        (dict(beta2=1.0), "--beta2 1.0"),
        (dict(dropout=-0.1), "--dropout -0.1"),
        (dict(preset="smal"), "no preset 'smal': did you mean 'small'"),
        (dict(worker=3), "no option 'worker': did you mean 'workers'"),
    ],
)
def test_what_cannot_work_is_refused_with_the_numbers(resolve, options, message):
    with pytest.raises(InputError, match=message):
        resolve(**options)


def test_too_little_memory_says_what_is_needed_what_is_there_and_what_would_fit(resolve):
    options = dict(preset="large", spheres=63, workers=2)
    with pytest.raises(InputError) as refused:
        resolve(memory=2 * 10**9, **options)
    message = str(refused.value)
    assert "parameters with 63 spheres and 2 workers need 3.2 GB, 2.0 GB are available" in message
    fitting = int(message.split(" spheres would fit")[0].split()[-1])
    assert f"try --spheres {fitting} --workers 2" in message
    # what it says is true: so many fit, one more does not
    assert resolve(memory=2 * 10**9, **options | {"spheres": fitting}).spheres == fitting
    with pytest.raises(InputError):
        resolve(memory=2 * 10**9, **options | {"spheres": fitting + 1})


def test_auto_computes_again_what_memory_asks_for(corpus, resolve, monkeypatch):
    job = plan.make_job(resolve(preset="medium"), Prepared.open(corpus))
    needed = {mode: plan.memory_bytes(replace(job, recompute=mode)) for mode in RECOMPUTE}
    assert needed["none"] > needed["cheap"] > needed["block"]
    for mode, memory in needed.items():
        monkeypatch.setattr(plan, "available_memory", lambda memory=memory: memory)
        assert plan.fit(job, "auto").recompute == mode
        assert plan.fit(job, "cheap").recompute == "cheap"
    monkeypatch.setattr(plan, "available_memory", lambda: 1)
    assert plan.fit(job, "auto").recompute == "block"


@pytest.mark.parametrize("resume", [False, True])
def test_where_computing_again_fits_that_is_advised(corpus, resolve, monkeypatch, resume):
    job = plan.make_job(resolve(preset="medium"), Prepared.open(corpus))
    needed = {mode: plan.memory_bytes(replace(job, recompute=mode)) for mode in RECOMPUTE}
    for asked, memory, advised in (("none", "cheap", "cheap"), ("none", "block", "block"), ("cheap", "block", "block")):
        monkeypatch.setattr(plan, "available_memory", lambda memory=memory: needed[memory])
        with pytest.raises(InputError, match=rf"Try --recompute {advised}: it fits"):
            plan.check_memory(plan.fit(job, asked), resume=resume)


def test_where_no_number_of_spheres_fits_a_smaller_model_is_advised(resolve):
    with pytest.raises(InputError, match="No number of spheres would fit: try a smaller --preset"):
        resolve(memory=10**8, preset="large")


def test_every_preset_resolves_and_leaves_nothing_open(resolve):
    for preset in PRESETS:
        config = resolve(2, preset=preset)
        left = {name for name, value in config.model_dump().items() if value is None}
        assert left <= {"epochs", "stop_at", "early_stop"} | DEFAULTS.keys()  # a plain loss has no soft targets
        assert config.vocab_size == 257 and config.min_lr == config.lr / 10
        assert config.warmup == min(100, config.steps // 10)


def test_epochs_are_counted_in_windows_of_the_training_text(resolve, corpus):
    windows = len(Prepared.open(corpus).train) // 64
    assert resolve(epochs=2, batch_size=10).steps == -(-2 * windows // 10)
    assert resolve(epochs=1e-9).steps == 1


def test_defaults_follow_the_length_of_the_run(resolve):
    short, long = resolve(steps=16), resolve(steps=100_000)
    assert (short.eval_every, short.save_every, short.warmup) == (2, 2, 1)
    assert (long.eval_every, long.save_every, long.warmup) == (250, 250, 100)


@pytest.mark.parametrize("cores", [1, 3, 4, 8])
def test_workers_are_pinned_where_they_do_not_outnumber_the_cores(resolve, corpus, cores):
    config = resolve(cores, workers=4, spheres=4, preset="tiny")
    job = plan.make_job(config, Prepared.open(corpus))
    assert job.cores == ([0, 1, 2, 3] if cores >= 4 else [])


@pytest.mark.parametrize(
    "options",
    [
        {"width": 10**18, "heads": 7}, {"layers": 10**9}, {"block_size": 10**30}, {"vocab_size": 2**40},
        {"ff_width": 10**18}, {"batch_size": 10**18}, {"lr": float("inf")}, {"min_lr": float("nan")},
        {"epochs": float("inf")}, {"dropout": float("nan")}, {"preset": ["small"]}, {"preset": {}}, {"x" * 10**4: 1},
        {"optimizer": "x" * 10**5}, {name: [1] for name in Config.model_fields if name not in ("preset", "epochs")},
    ],
)  # fmt: skip
def test_options_that_no_machine_can_take_are_refused_at_once_in_a_paragraph(options):
    with pytest.raises(InputError) as refused:
        merge(options)
    assert len(str(refused.value)) < 1500


def test_epochs_of_more_steps_than_a_run_has_are_refused(resolve):
    with pytest.raises(InputError, match=r"--epochs 1e\+300 are .* steps of this text, and a run has at most"):
        resolve(epochs=1e300)


def test_a_warmup_longer_than_the_epochs_is_refused(resolve):
    with pytest.raises(InputError, match="--warmup 1000000 is longer than the run"):
        resolve(epochs=1, warmup=10**6)


@pytest.mark.parametrize("text", ["lr = " + "9" * 5000, "lr = " + "[" * 5000])
def test_a_toml_that_breaks_parsers_is_bad_input(tmp_path, text):
    (tmp_path / "options.toml").write_text(text)
    with pytest.raises(InputError, match="a number is too long, or values are nested too deeply"):
        merge({}, tmp_path / "options.toml")


def test_a_configuration_that_never_ends_is_bad_input():
    with pytest.raises(InputError, match=f"more than {MAX_TOML_BYTES:,} bytes"):
        merge({}, Path("/dev/zero"))


def test_names_of_any_characters_are_read_back_from_toml(tmp_path):
    name = '/\U0001f600 ü \x7f \x1b " \\ \n'
    (tmp_path / "config.toml").write_text(to_toml(Config(), {"data": name}), encoding="utf-8")
    assert read_toml(tmp_path / "config.toml")["data"] == name
