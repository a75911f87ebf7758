"""Every operation on the disk fails, or is the process's last: what was good before is good after."""

import errno
import os
import resource
import shutil
import signal

import numpy as np
import pytest

from cllm_spheres.checkpoint.disk import Disk
from cllm_spheres.checkpoint.store import SaveFailed, Store
from tests.faults.amounts import amount


def work(store, save):
    """A second checkpoint, marked and saved again, then a third; the older ones pruned."""
    save(store, 2)
    store.mark_best(2)
    save(store, 2)
    save(store, 3)
    store.prune(1)
    store.prune(1)


def cannot_exchange(disk, exchanges):
    """The disk, or one that must rename twice."""
    if not exchanges:

        def exchange(one, other):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        disk.exchange = exchange
    return disk


@pytest.fixture(params=[True, False], ids=["exchange", "two-renames"])
def exchanges(request):
    """Whether the file system can swap two names."""
    return request.param


@pytest.fixture
def before(run, save):
    """A run with step 1 as its best."""
    save(Store(run), 1)
    Store(run).mark_best(1)
    return run


@pytest.fixture
def operations(before, save, recorder, tmp_path, exchanges):
    """What `work` does, in order, as (name, *paths)."""
    disk = cannot_exchange(recorder(), exchanges)
    work(Store(copy_of(before, tmp_path / "recorded"), disk), save)
    return disk.operations


def published(operations):
    """The newest step that these operations have made visible."""
    names = [paths[-1].name for name, *paths in operations if name == "rename"]
    return max([1, *(int(name[5:]) for name in names if name.startswith("step-"))])


def copy_of(run, target):
    return shutil.copytree(run, target, symlinks=True)


def assert_whole(store, assert_same):
    """Every checkpoint that can be seen verifies; returns the newest step."""
    for step in store.steps():
        assert_same(store.load(step))
    good, refused = store.newest_good()
    assert refused == []
    assert store.best_step() in store.steps()
    return good.step


class Failing(Disk):
    """Operation number `place` fails with `number`, a write in its middle; later ones too if that `lasts`."""

    def __init__(self, place, number, lasts):
        self.left, self.number, self.lasts = place, number, lasts
        super().__init__(self.count)

    def count(self, operation, *paths):
        self.left -= 1
        if self.left == -1 or (self.left < -1 and self.lasts):
            raise OSError(self.number, os.strerror(self.number))

    def write(self, descriptor, path, data):
        if self.left == 0:
            os.write(descriptor, data[: len(data) // 2])
        super().write(descriptor, path, data)


@pytest.mark.parametrize(
    "number, lasts",
    [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, False), (errno.EROFS, True)],
    ids=["full", "stays-full", "error", "read-only"],
)
def test_a_failure_at_any_operation_harms_nothing_older(
    before, save, operations, assert_same, leftovers, tmp_path, number, lasts, exchanges
):
    last_save = max(place for place, (name, *paths) in enumerate(operations) if paths[-1].name == "step-00000003")
    for place in range(number % 5, len(operations), amount(9, 1)):
        run = copy_of(before, tmp_path / f"{number}-{place}")
        store = Store(run, cannot_exchange(Failing(place, number, lasts), exchanges))
        try:
            work(store, save)
        except SaveFailed as error:
            assert error.reason == os.strerror(number)
            assert error.reason in str(error) and "Older checkpoints are intact" in str(error)
            assert error.free_bytes is not None and error.exit_code == 1
        if not exchanges:
            Store(run).tidy()  # as training does before it looks for the newest
        newest = assert_whole(Store(run), assert_same)
        assert newest >= published(operations[:place])
        if not lasts and place <= last_save and not operations[place][0].startswith("remove"):
            assert leftovers(run) == []
        save(Store(run), 4)  # the disk is well again
        assert assert_whole(Store(run), assert_same) == 4
        assert leftovers(run) == []
        shutil.rmtree(run)


class Killing(Disk):
    """Ends the process at operation number `place`: before it, or in the middle of it where it is a write."""

    def __init__(self, place, midway):
        self.left, self.midway = place, midway
        super().__init__(self.count)

    def count(self, operation, *paths):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, descriptor, path, data):
        if self.left == 0 and self.midway:
            os.write(descriptor, data[: len(data) // 2])
        super().write(descriptor, path, data)


def killed(work, *arguments):
    """`work` in a child that must end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("midway", [False, True], ids=["before", "midway"])
def test_a_kill_at_any_operation_leaves_a_good_checkpoint(
    before, save, operations, assert_same, leftovers, tmp_path, midway, exchanges
):
    places = [p for p, (name, *_) in enumerate(operations) if not midway or name == "write"]
    for place in places[:: amount(2, 1) if midway else amount(5, 1)]:
        run = copy_of(before, tmp_path / str(place))
        killed(work, Store(run, cannot_exchange(Killing(place, midway), exchanges)), save)
        if not exchanges:
            Store(run).tidy()  # as training does before it looks for the newest
        newest = assert_whole(Store(run), assert_same)
        assert newest >= published(operations[:place])
        save(Store(run), 4)
        assert leftovers(run) == []
        assert assert_whole(Store(run), assert_same) == 4
        shutil.rmtree(run)


def test_a_kill_at_any_operation_of_the_first_save_leaves_none_or_a_whole_one(
    tmp_path, save, recorder, assert_same, leftovers
):
    (tmp_path / "recorded").mkdir()
    disk = recorder()
    save(Store(tmp_path / "recorded", disk), 1)
    whole_at = max(place for place, (name, *_) in enumerate(disk.operations) if name == "write") + 1
    for place in range(len(disk.operations)):
        run = tmp_path / str(place)
        run.mkdir()
        killed(save, Store(run, Killing(place, midway=True)), 1)
        for step in Store(run).steps():
            assert_same(Store(run).load(step))
        Store(run).tidy()
        assert len(Store(run).steps()) == (place >= whole_at)  # also where only its name was missing
        save(Store(run), 1)
        assert_same(Store(run).load(1))
        assert Store(run).steps() == [1] and leftovers(run) == []


def test_each_rename_comes_after_the_syncs_it_relies_on(operations):
    unsynced = {}  # path of a file or folder -> the operation since its last sync
    published = 0
    for name, *paths in operations:
        if name in ("create", "write", "create_folder", "symlink"):
            unsynced[paths[0]] = name
            if name != "write":
                unsynced[paths[0].parent] = name
        elif name in ("sync", "sync_folder"):
            unsynced.pop(paths[0], None)
        elif name in ("rename", "exchange"):
            source, target = paths
            if target.name.startswith("step-"):
                assert [path for path in unsynced if path == source or source in path.parents] == []
                published += 1
            unsynced[target.parent] = name
        elif name in ("remove", "remove_folder"):  # only what a power cut cannot bring back under its name
            folder = next(path for path in paths[0].parents if path.name == "checkpoints")
            assert unsynced.get(folder) is None
    assert published == 3
    assert not unsynced.keys() - {path for path in unsynced if path.name.startswith(".tmp-")}


def test_the_manifest_is_written_last(operations):
    created = [paths[0] for name, *paths in operations if name == "create"]
    assert [path.name == "manifest.json" for path in created] == ([False] * 5 + [True]) * 3


def test_before_the_first_save_its_folder_is_synced_into_the_run(run, save, recorder):
    disk = recorder()
    save(Store(run, disk), 1)
    assert disk.operations[:2] == [("create_folder", run / "checkpoints"), ("sync_folder", run)]


def test_a_full_disk_says_what_is_needed_and_what_is_free(before, make_content):
    class Full(Disk):
        def write(self, descriptor, path, data):
            if path.name == "optimizer.safetensors":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().write(descriptor, path, data)

        def free_bytes(self, path):
            return 1_000_000

    with pytest.raises(SaveFailed, match=r"No space left on device. It needs 0.0 MB, 1.0 MB are free") as failed:
        Store(before, Full()).save(2, **make_content(2))
    size = sum(path.stat().st_size for path in Store(before).path(1).iterdir() if path.name != "manifest.json")
    assert failed.value.needed_bytes == size and failed.value.free_bytes == 1_000_000


def test_a_real_limit_on_file_size_is_a_failed_save(before, make_content, leftovers, assert_same):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            large = make_content(2) | {"model": {"large": np.zeros(1_000_000, np.float32)}}
            try:
                Store(before).save(2, **large)
            except SaveFailed:
                code = 7
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert leftovers(before) == [] and assert_whole(Store(before), assert_same) == 1


def test_a_save_that_is_interrupted_leaves_nothing(before, make_content, leftovers):
    def interrupt(operation, *paths):
        if operation == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(before, Disk(interrupt)).save(2, **make_content(2))
    assert leftovers(before) == []


def test_a_failure_between_the_two_renames_of_an_old_file_system_puts_the_old_back(before, make_content, assert_same):
    class Old(Disk):
        def exchange(self, one, other):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        def rename(self, source, target):
            if target.name == "step-00000001" and (source / "state.json").read_bytes() == b"{}\n":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().rename(source, target)

    with pytest.raises(SaveFailed):
        Store(before, Old()).save(1, **make_content(1) | {"state": {}})
    assert assert_whole(Store(before), assert_same) == 1
