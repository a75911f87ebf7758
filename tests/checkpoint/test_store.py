"""Saving, finding, marking and pruning checkpoints."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cllm_spheres.checkpoint import tensors
from cllm_spheres.checkpoint.checkpoint import FILES
from cllm_spheres.checkpoint.disk import Disk
from cllm_spheres.checkpoint.files import TEMPORARY, Damaged, temporary
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import InputError

arrays = hnp.arrays(
    dtype=st.sampled_from([np.dtype(name) for name in tensors.DTYPES]),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)


def test_what_was_saved_is_loaded(store, save, assert_same):
    assert save(store, 100) == store.run / "checkpoints" / "step-00000100"
    checkpoint = store.load()
    assert checkpoint.step == 100
    assert_same(checkpoint)
    assert all(array.flags.writeable for array in checkpoint.model.values())


def test_every_float_of_the_state_reads_back_as_the_same_bits(store, make_content):
    values = list(np.random.default_rng(0).normal(size=200) * 10.0 ** np.arange(-100, 100))
    store.save(1, **make_content(1) | {"state": {"values": values}})
    assert store.load(1).state["values"] == values


def test_equal_weights_are_equal_bytes(tmp_path, make_content):
    names = []
    for order in (1, -1):
        run = tmp_path / str(order)
        run.mkdir()
        new = make_content(7)
        new["model"] = dict(list(new["model"].items())[::order])
        names.append(Store(run).save(7, **new))
    for name in (*FILES, "manifest.json"):
        assert (names[0] / name).read_bytes() == (names[1] / name).read_bytes()


@given(named=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), arrays, max_size=5))
def test_tensors_are_written_byte_for_byte_as_the_library_writes_them(named):
    named.pop("__metadata__", None)  # the library's own word
    file = tensors.File(named)
    written = b"".join(file.chunks())
    assert len(written) == file.size_bytes
    assert written == safetensors.numpy.save(named, metadata={"format": "pt"})


def test_arrays_that_are_not_contiguous_are_saved_as_they_look(store, make_content):
    wide = np.arange(12, dtype=np.float32).reshape(3, 4)
    store.save(1, **make_content(1) | {"model": {"transposed": wide.T, "strided": wide[:, ::2]}})
    model = store.load(1).model
    assert np.array_equal(model["transposed"], wide.T) and np.array_equal(model["strided"], wide[:, ::2])


def test_a_file_larger_than_one_chunk_is_whole(store, make_content):
    large = np.arange(700_000, dtype=np.float32)
    store.save(1, **make_content(1) | {"model": {"large": large}})
    assert np.array_equal(store.load(1).model["large"], large)


def test_other_tools_read_the_model(store, save, make_content):
    with safetensors.safe_open(save(store, 3) / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(make_content(3)["model"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": {"a": np.zeros(2)}},
        {"optimizer": {"a": np.zeros(2, complex)}},
        {"optimizer": {"a": np.zeros(2, ">f4")}},
        {"state": {"loss": float("nan")}},
    ],
)
def test_what_cannot_be_read_back_is_refused_before_the_disk_is_touched(store, make_content, wrong):
    with pytest.raises(ValueError):
        store.save(1, **make_content(1) | wrong)
    assert not store.folder.exists()


def test_the_tokenizer_may_be_a_file(store, make_content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"{}")
    store.save(1, **make_content(1) | {"tokenizer": path})
    assert store.load().tokenizer_path.read_bytes() == b"{}"
    with pytest.raises(InputError, match="Cannot read the tokenizer"):
        store.save(2, **make_content(2) | {"tokenizer": tmp_path / "nowhere.json"})


@pytest.mark.parametrize("can_exchange", [True, False])
def test_saving_a_step_again_replaces_it(run, save, make_content, leftovers, can_exchange):
    class Old(Disk):
        def exchange(self, one, other):
            raise OSError(22, "Invalid argument")

    store = Store(run, Disk() if can_exchange else Old())
    save(store, 5)
    store.save(5, **make_content(5) | {"state": {"again": 1}})
    assert store.load(5).state == {"again": 1}
    assert store.steps() == [5] and leftovers(run) == []


def test_none_means_the_best_or_else_the_last(store, save):
    for step in (10, 20, 30):
        save(store, step)
    assert store.find() == store.find("last") == store.path(30)
    store.mark_best(20)
    assert store.find() == store.find("best") == store.path(20)
    assert store.find("last") == store.path(30)
    assert store.find(10) == store.find("10") == store.path(10)
    assert os.readlink(store.folder / "best") == "step-00000020"


def test_a_run_that_was_moved_keeps_its_best(store, save, tmp_path):
    save(store, 1)
    save(store, 2)
    store.mark_best(1)
    store.run.rename(tmp_path / "moved")
    assert Store(tmp_path / "moved").load().step == 1


def test_a_copy_that_followed_links_keeps_its_best(store, save, tmp_path, leftovers):
    save(store, 1)
    save(store, 2)
    store.mark_best(1)
    copy = Store(Path(shutil.copytree(store.run, tmp_path / "copy")))
    assert not (copy.folder / "best").is_symlink()
    assert copy.best_step() == 1
    copy.mark_best(2)
    assert copy.best_step() == 2 and leftovers(copy.run) == []


def test_a_best_without_its_checkpoint_is_none(store, save):
    save(store, 1)
    save(store, 2)
    store.mark_best(1)
    shutil.rmtree(store.path(1))
    assert store.best_step() is None
    assert store.find() == store.path(2)


@pytest.mark.parametrize(
    "which, says",
    [
        (24, "nearest is 20"),
        ("bets", "did you mean 'best'"),
        ("best", "no best checkpoint"),
        ("-1", "no checkpoint .-1."),
        ("9" * 5000, "no checkpoint"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_an_error_that_names_what_is(store, save, which, says):
    for step in (10, 20, 30):
        save(store, step)
    with pytest.raises(InputError, match=says):
        store.find(which)


def test_a_run_without_checkpoints_says_so(run):
    for name, file in (("begun", "config.toml"), ("model", "config.json"), ("text", "text.txt")):
        (run / name).mkdir()
        (run / name / file).touch()
    for store, says in (
        (Store(run / "begun"), "no checkpoints yet. It goes on with: cllm-spheres train --resume --run"),
        (Store(run / "model"), "is a model of another tool: cllm-spheres import"),
        (Store(run / "text"), "is not a run: it has neither a config.toml nor checkpoints"),
        (Store(run / "nowhere"), "does not exist"),
    ):
        assert store.steps() == []
        for look in (store.find, store.load, store.newest_good):
            with pytest.raises(InputError, match=says):
                look()


def test_prune_keeps_the_newest_and_the_best(store, save, leftovers):
    for step in range(1, 7):
        save(store, step)
    store.mark_best(2)
    assert store.prune(3) == [3, 1]
    assert store.steps() == [2, 4, 5, 6] and store.best_step() == 2
    assert store.prune(1) == [5, 4]
    assert store.steps() == [2, 6]
    assert leftovers(store.run) == []


@pytest.mark.parametrize("seen", [True, False])
def test_a_damaged_checkpoint_never_pushes_out_a_good_one(store, save, seen):
    for step in (1, 2, 3):
        save(store, step)
    if seen:  # only contents differ: found by loading
        path = store.path(3) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert store.newest_good()[0].step == 2
    else:  # sizes differ: seen by pruning
        (store.path(3) / "model.safetensors").write_bytes(b"")
    store.prune(1)
    assert store.steps() == [2, 3]
    save(store, 3)
    store.prune(1)
    assert store.steps() == [3]


def test_a_damaged_checkpoint_that_a_resume_passed_over_pushes_out_no_good_one(run, save):
    for step in (1, 2, 3):
        save(Store(run), step)
    path = Store(run).path(3) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    good, _ = Store(run).newest_good()
    store = Store(run)  # as training has: another one than that which looked
    store.distrust_after(good.step)
    save(store, 4)
    assert store.prune(1) == [3, 2, 1] and store.steps() == [4]


def test_prune_renames_before_it_deletes(run, save, recorder):
    disk = recorder()
    store = Store(run, disk)
    save(store, 1)
    save(store, 2)
    disk.operations.clear()
    store.prune(1)
    (name, source, aside), second = disk.operations[:2]
    assert (name, source) == ("rename", store.path(1)) and TEMPORARY.fullmatch(aside.name)
    assert second == ("sync_folder", store.folder)
    assert all(path.is_relative_to(aside) for _, path in disk.operations[2:])


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(store, save, leftovers):
    save(store, 1)
    mine = temporary(store.folder)  # in use by this process
    start = int(Path("/proc/1/stat").read_bytes().rpartition(b")")[2].split()[19])
    living = [mine.name, f".tmp-1-{start}-0", ".tmp-of-somebody-else"]
    dead = [
        f".tmp-1-{start + 1}-0",
        ".tmp-4194305-5-0",
        f".tmp-{os.getpid()}-{mine.name.split('-')[2]}-999999",
    ]
    for name in living + dead:
        (store.folder / name).mkdir()
        (store.folder / name / "model.safetensors").touch()
    save(store, 2)
    assert sorted(leftovers(store.run)) == sorted(living)


@pytest.mark.parametrize(
    "step, damaged, then", [(3, False, [2, 3]), (1, False, [2]), (3, True, [2])], ids=["newer", "older", "damaged"]
)
def test_a_whole_checkpoint_newer_than_all_others_gets_its_name_back(
    store, save, leftovers, assert_same, step, damaged, then
):
    save(store, 2)
    path = save(store, step).rename(store.folder / ".tmp-4194305-5-0")  # its process died between two renames
    if damaged:
        (path / "state.json").write_bytes((path / "state.json").read_bytes().replace(b"3", b"4"))
    store.tidy()
    assert store.steps() == then and leftovers(store.run) == []
    assert_same(store.newest_good()[0])


def test_the_optimizer_is_read_only_when_asked_for(store, save, assert_same):
    path = save(store, 1) / "optimizer.safetensors"
    assert_same(store.load(optimizer=False))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    checkpoint = store.load(optimizer=False)
    assert checkpoint.model
    with pytest.raises(Damaged, match=r"optimizer\.safetensors has sha256"):
        _ = checkpoint.optimizer


def test_the_manifest_is_last_and_ends_with_its_own_sha256(store, save):
    manifest = json.loads((save(store, 1) / "manifest.json").read_text())
    assert list(manifest)[-1] == "sha256"
    assert manifest["step"] == 1 and set(manifest["files"]) == set(FILES)
