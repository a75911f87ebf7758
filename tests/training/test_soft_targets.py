"""Runs whose targets are soft: what may be asked for, the file of neighbours, and the same bits as ever."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from cllm_spheres.config import merge
from cllm_spheres.crystal.lattice import features
from cllm_spheres.errors import InputError, Interrupted, RunFailed
from cllm_spheres.text.frequency import frequency_order
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training import session
from cllm_spheres.training.launch import Launch
from cllm_spheres.training.soft_targets import NAME, loss_options, table, table_bytes
from tests.runs import TINY, finished, resume, train_whole, wait_until

SHORT = dict(steps=12, eval_every=6, save_every=6, seed=3)


def options_of(vocab_size=257, **options):
    return loss_options(merge(options)[0], vocab_size)


def test_what_is_left_open_is_filled_in_and_what_a_loss_does_not_have_is_off():
    crystal = dict(alpha=0.1, neighbours=16, neighbour_temperature=0.1, gcd_weight=0.7, ulam_weight=0.3)
    assert options_of(loss="crystalline") == options_of(loss="random") == crystal
    assert options_of(loss="crystalline", vocab_size=9)["neighbours"] == 8
    assert options_of(loss="smoothing", alpha=0.2) == dict.fromkeys(crystal) | {"alpha": 0.2}
    assert options_of() == dict.fromkeys(crystal)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(alpha=0.2), "--alpha 0.2 means nothing to --loss cross-entropy"),
        (dict(loss="smoothing", neighbours=4), "--neighbours 4 means nothing to --loss smoothing"),
        (
            dict(loss="crystalline", vocab_size=1),
            "--loss crystalline needs two tokens or more, and the vocabulary is 1",
        ),
        (dict(loss="crystalline", neighbours=257), "--neighbours 257 are more than the others of a vocabulary of 257"),
        (dict(loss="crystalline", gcd_weight=0, ulam_weight=0), "no token is more similar than another"),
        (dict(loss="crystalline", alpha=1.5), "--alpha 1.5: input should be less than or equal to 1"),
        (dict(loss="crystalline", alpha=-0.1), "--alpha -0.1: input should be greater than or equal to 0"),
        (
            dict(loss="crystalline", neighbour_temperature=0),
            "--neighbour-temperature 0: input should be greater than 0",
        ),
        (dict(loss="crystalline", gcd_weight=1e308), "--gcd-weight 1e+308: input should be less than or equal to"),
        (dict(loss="cristalline"), "--loss cannot be 'cristalline': did you mean 'crystalline'?"),
        (dict(init="latice"), "--init cannot be 'latice': did you mean 'lattice'?"),
    ],
)
def test_what_cannot_be_is_refused_in_words(options, said):
    with pytest.raises(InputError) as refused:
        options_of(**options)
    assert said in str(refused.value)


@pytest.fixture(scope="module")
def crystalline(corpus, tmp_path_factory):
    return train_whole(corpus, tmp_path_factory.mktemp("crystalline") / "run", loss="crystalline", **SHORT)


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    return train_whole(corpus, tmp_path_factory.mktemp("plain") / "run", **SHORT)


def test_both_losses_are_written_down_and_the_evaluation_is_plain(crystalline, plain):
    first, plain_first = crystalline.of("step")[0], plain.of("step")[0]
    assert first["cross_entropy"] == plain_first["cross_entropy"] == plain_first["loss"]  # of the same weights
    assert first["loss"] != first["cross_entropy"]
    assert crystalline.evaluations[0] == plain.evaluations[0]
    assert crystalline.files != plain.files


@pytest.mark.parametrize("loss", ["smoothing", "random"])
def test_the_other_soft_targets_learn_too(loss, corpus, tmp_path):
    run = train_whole(corpus, tmp_path / "run", loss=loss, alpha=0.2, **SHORT)
    assert run.evaluations[-1][1] < run.evaluations[0][1] - 0.5
    assert (run.run / NAME).exists() == (loss == "random")


def test_a_run_without_its_file_makes_it_again_and_keeps_its_bits(crystalline, corpus, tmp_path):
    made = (crystalline.run / NAME).read_bytes()
    stopped = train_whole(corpus, tmp_path / "stopped", loss="crystalline", **SHORT, stop_at=6).run
    for damage in ("missing", "cut short", "one bit", "another run's"):
        run = shutil.copytree(stopped, tmp_path / damage, symlinks=True)
        path = run / NAME
        assert path.read_bytes() == made
        if damage == "missing":
            path.unlink()
        elif damage == "cut short":
            path.write_bytes(made[:-1])
        elif damage == "one bit":
            path.write_bytes(bytes([made[0] ^ 1]) + made[1:])
        else:
            other = train_whole(corpus, tmp_path / "other", loss="random", **SHORT)
            path.write_bytes((other.run / NAME).read_bytes())
        resumed = resume(run, workers=1)
        assert path.read_bytes() == made
        assert (resumed.curve, resumed.files) == (crystalline.curve, crystalline.files)


def test_a_table_that_vanishes_meanwhile_is_not_missed_by_a_new_worker(crystalline, corpus, tmp_path):
    plan = session.new_run(corpus, TINY | dict(loss="crystalline", **SHORT), run=tmp_path / "run", file=None)
    launch = Launch().obey(replace(plan, faults=("forward:9:1:kill",)))
    wait_until((plan.run / NAME).exists, "the table")
    (plan.run / NAME).unlink()
    disturbed = finished(launch)
    assert disturbed.code == 0 and disturbed.event("recovered"), disturbed.message
    assert disturbed.bits == crystalline.bits


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"neighbours": None}, "neighbours is missing, which loss crystalline has"),
        ({"gcd_weight": None}, "gcd_weight is missing"),
        ({"loss": "smoothing"}, "neighbours is 16, which loss smoothing does not have"),
        ({"loss": None}, "alpha is 0.1, which loss cross-entropy does not have"),
        ({"gcd_weight": 0.0, "ulam_weight": 0.0}, "no token is more similar than another"),
        ({"neighbours": 300}, "--neighbours 300 are more than the others"),
    ],
)
def test_a_configuration_that_was_changed_is_not_resumed_as_another_loss(changes, said, crystalline, tmp_path):
    run = shutil.copytree(crystalline.run, tmp_path / "run", symlinks=True)
    lines = (run / "config.toml").read_text().splitlines()
    for name, value in changes.items():
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{name} = ")]
        lines[at] = "" if value is None else f"{name} = {json.dumps(value)}"
    (run / "config.toml").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"config\.toml is damaged") as refused:
        session.resumed_run(run, dict(steps=20), data=None)
    assert said in str(refused.value)


def test_a_runs_configuration_serves_for_its_control_too(crystalline):
    file = crystalline.run / "config.toml"
    assert merge({"loss": "random"}, file)[0].neighbours == 16
    smoothing, _ = merge({"loss": "smoothing"}, file)
    assert (smoothing.alpha, smoothing.neighbours) == (0.1, None)
    assert merge({"loss": "cross-entropy"}, file)[0].alpha is None


def test_a_table_that_is_interrupted_leaves_no_file(crystalline, corpus, tmp_path):
    def progress(done, total):
        raise Interrupted("enough", 2)

    with pytest.raises(Interrupted):
        table_bytes(tmp_path, crystalline.config, Prepared.open(corpus), progress)
    assert not list(tmp_path.iterdir())


def test_what_lies_in_the_tables_place_is_replaced_or_named(crystalline, corpus, tmp_path):
    prepared = Prepared.open(corpus)
    os.mkfifo(tmp_path / NAME)
    made = table_bytes(tmp_path, crystalline.config, prepared, lambda done, total: None)
    assert (tmp_path / NAME).read_bytes()[: len(made)] == made
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    with pytest.raises(RunFailed, match="cannot be written"):
        table_bytes(tmp_path, crystalline.config, prepared, lambda done, total: None)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_share_of_nothing_is_the_plain_loss_to_the_bit(plain, corpus, tmp_path):
    assert train_whole(corpus, tmp_path / "run", loss="crystalline", alpha=0.0, **SHORT).bits == plain.bits


def test_a_death_in_any_phase_changes_no_bit(crystalline, corpus, tmp_path):
    plan = session.new_run(corpus, TINY | dict(loss="crystalline", **SHORT), run=tmp_path / "run", file=None)
    faults = ("forward:3:1:kill", "backward:6:2:kill", "update:9:0:kill")
    disturbed = finished(Launch().obey(replace(plan, faults=faults)))
    assert disturbed.code == 0 and [r["event"] for r in disturbed.of("event")].count("recovered") == 3
    assert disturbed.bits == crystalline.bits


def test_neighbours_are_ordered_by_the_frequency_of_the_training_part(crystalline, corpus):
    prepared = Prepared.open(corpus)
    order_R, counts_V = frequency_order(prepared)
    assert np.array_equal(counts_V, np.bincount(prepared.train, minlength=prepared.vocab_size))
    ids_VK, _ = table(crystalline.config, prepared)
    # of number 1 the nearest is 2: half a divisor in common, and beside it on the spiral
    assert ids_VK[order_R[0], 0] == order_R[1]
    data = (crystalline.run / NAME).read_bytes()
    assert data[: ids_VK.nbytes] == ids_VK.tobytes()


def test_embeddings_begin_on_the_lattice(corpus, tmp_path):
    run = train_whole(corpus, tmp_path / "run", init="lattice", lr=1e-30, weight_decay=0.0, steps=1)
    usual = train_whole(corpus, tmp_path / "usual", lr=1e-30, weight_decay=0.0, steps=1)
    prepared = Prepared.open(corpus)
    order_R, _ = frequency_order(prepared)
    found, others = run.weights(), usual.weights()
    expected_VC = features(prepared.vocab_size, run.config.width) * np.float32(0.02)
    assert np.allclose(found["wte.weight"][order_R], expected_VC, rtol=0, atol=1e-29)  # one step of 1e-30
    assert abs(expected_VC.std() - 0.02) < 1e-3 and abs(others["wte.weight"].std() - 0.02) < 1e-3
    for name in found.keys() - {"wte.weight"}:
        assert np.allclose(found[name], others[name], rtol=0, atol=1e-29), name


def test_a_model_that_is_begun_from_has_its_own_embeddings(crystalline, corpus, tmp_path):
    with pytest.raises(InputError, match="--init lattice contradicts --from"):
        session.new_run(
            corpus, dict(init="lattice"), run=tmp_path / "run", file=None, start_from=crystalline.run
        )  # fmt: skip
