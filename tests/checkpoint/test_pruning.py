"""Less disk for a run that has ended: what goes, what is left, and what still works with it."""

from __future__ import annotations

import re
import shutil

import pytest
from cllm_spheres_cli.prune import prune as command

from cllm_spheres.checkpoint.checkpoint import OPTIMIZER, Checkpoint, NoOptimizer, looks_whole
from cllm_spheres.checkpoint.disk import Disk
from cllm_spheres.checkpoint.files import Damaged
from cllm_spheres.checkpoint.lock import Lock
from cllm_spheres.checkpoint.pruning import prune
from cllm_spheres.checkpoint.store import SaveFailed, Store
from cllm_spheres.errors import InputError


def size(run):
    return sum(path.stat().st_size for path in run.glob("checkpoints/step-*/*"))


@pytest.fixture
def five(store, save):
    """Steps 1 to 5, of which 2 is the best."""
    for step in range(1, 6):
        save(store, step)
    store.mark_best(2)
    return store


def test_the_best_and_the_last_are_left(five, assert_same, capsys):
    command([five.run])
    assert five.steps() == [2, 5] and five.best_step() == 2
    for step in (2, 5):
        assert_same(five.load(step))
    said = capsys.readouterr().out
    assert re.search(r"run: \d+ kB freed, 3 checkpoints removed\. Left: \d+ kB, steps 2 \(best\), 5\.$", said.strip())
    assert prune(five.run).freed_bytes == 0


def test_a_checkpoint_with_a_flipped_bit_does_not_push_out_the_good_ones(five):
    path = five.path(5) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert prune(five.run).removed == [3, 1]
    assert five.steps() == [2, 4, 5] and five.newest_good()[0].step == 4
    for step in (2, 4):
        (five.path(step) / "model.safetensors").unlink()
    with pytest.raises(InputError, match="can be used, so none was removed"):
        prune(five.run)


def test_what_is_freed_is_counted(five):
    before = size(five.run)
    done = prune(five.run, weights_only=True)
    assert sorted(done.removed) == [1, 3, 4] and done.kept == [2, 5] and done.best == 2
    assert done.left_bytes == size(five.run) and done.freed_bytes == before - size(five.run) > 0


def test_weights_alone_are_a_whole_checkpoint_from_which_no_run_goes_on(five, make_content):
    prune(five.run, weights_only=True)
    for step in (2, 5):
        assert not (five.path(step) / OPTIMIZER).exists() and looks_whole(five.path(step))
        checkpoint = five.load(step, optimizer=False)
        assert checkpoint.model["ln_f.bias"].tobytes() == make_content(step)["model"]["ln_f.bias"].tobytes()
        with pytest.raises(NoOptimizer, match=r"weights alone.* moments .* train DATA --from .*run --run NEW"):
            checkpoint.optimizer  # noqa: B018
    with pytest.raises(NoOptimizer):
        five.newest_good()
    (five.path(5) / "model.safetensors").unlink()
    with pytest.raises(Damaged, match=r"model\.safetensors is missing"):
        five.load(5, optimizer=False)


def test_a_run_that_goes_on_is_refused_and_nothing_is_removed_from_any(five, tmp_path):
    shutil.copytree(five.run, tmp_path / "other", symlinks=True)
    with Lock(five.run), pytest.raises(InputError, match="is going on, and removes old checkpoints by itself"):
        command([tmp_path / "other", five.run])
    assert five.steps() == Store(tmp_path / "other").steps() == [1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="does not exist"):
        command([five.run, tmp_path / "nowhere"])
    assert five.steps() == [1, 2, 3, 4, 5]


def test_whatever_fails_while_moments_are_removed_the_weights_are_whole(store, save, recorder):
    save(store, 1)
    disk = recorder()
    copy = shutil.copytree(store.run, store.run.with_name("copy"))
    Store(copy, disk).drop_optimizer(1)
    assert {operation for operation, *_ in disk.operations} >= {"create", "write", "sync", "rename", "remove"}
    for last in range(len(disk.operations)):
        run = shutil.copytree(store.run, store.run.with_name(f"failed-{last}"))
        count = iter(range(last + 1))

        def fail(*_, count=count, last=last):
            if next(count) == last:
                raise OSError(28, "No space left on device")

        with pytest.raises(SaveFailed, match="could not be removed: No space left"):
            Store(run, Disk(fail)).drop_optimizer(1)
        Checkpoint(Store(run).path(1), optimizer=False)
        Store(run).drop_optimizer(1)  # tried again
        names = {path.name for path in Store(run).path(1).iterdir()}
        assert names == {path.name for path in Store(copy).path(1).iterdir()} and OPTIMIZER not in names
