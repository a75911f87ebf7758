"""The power fails at any moment, also after a kill or an error: what was saved is there, and what is there is whole.

A disk may keep less than was written. Of a file it surely has what was synced; later bytes may be there, missing,
cut short or zeros. Of a folder it surely has the names as they were synced; of every later change it has any, in
any combination. The model below keeps account of both, and makes folders as a disk could show them afterwards.
"""

from __future__ import annotations

import errno
import os
import random
import shutil

import pytest

from cllm_spheres.checkpoint import files
from cllm_spheres.checkpoint.disk import Disk
from cllm_spheres.checkpoint.store import SaveFailed, Store
from tests.faults.amounts import amount


class File:
    def __init__(self):
        self.now = self.synced = b""

    def after_a_cut(self, path, choose):
        unsynced = self.now[len(self.synced) :]
        path.write_bytes(self.synced + choose([b"", unsynced[: len(unsynced) // 2], bytes(len(unsynced)), unsynced]))


class Link:
    def __init__(self, target):
        self.target = target

    def after_a_cut(self, path, choose):
        path.symlink_to(self.target)


class Folder:
    def __init__(self):
        self.now, self.synced, self.changes = {}, {}, []

    def change(self, **names):
        """Names to what they stand for from now on; None removes. All of them at once, as by a rename."""
        self.changes.append(names)
        self.now = {name: node for name, node in (self.now | names).items() if node is not None}

    def sync(self):
        self.synced, self.changes = self.now, []

    def after_a_cut(self, path, choose):
        names = dict(self.synced)
        for change in self.changes:
            if choose([False, True]):
                names |= change
        path.mkdir()
        for name, node in names.items():
            if node is not None:
                node.after_a_cut(path / name, choose)


class Dead(BaseException):
    """The process was killed: nothing that it would do after that happens."""


class Volatile(Disk):
    """A disk that knows what a power cut would leave, and need not wait for real syncs: it is never cut off itself.

    `before` may raise; `exchanges` says whether two names can be swapped.
    """

    def __init__(self, run, before, exchanges):
        super().__init__(before)
        self.run, self.root, self.exchanges = run, Folder(), exchanges

    def node(self, path):
        node = self.root
        for name in path.relative_to(self.run).parts:
            node = node.now[name]
        return node

    def change(self, path, node):
        self.node(path.parent).change(**{path.name: node})

    def create_folder(self, path):
        super().create_folder(path)
        self.change(path, Folder())

    def create(self, path):
        descriptor = super().create(path)
        self.change(path, File())
        return descriptor

    def write(self, descriptor, path, data):
        super().write(descriptor, path, data)
        self.node(path).now += bytes(data)

    def sync(self, descriptor, path):
        self._before("sync", path)
        self.node(path).synced = self.node(path).now

    def sync_folder(self, path):
        self._before("sync_folder", path)
        self.node(path).sync()

    def rename(self, source, target):
        super().rename(source, target)
        assert source.parent == target.parent
        self.node(source.parent).change(**{source.name: None, target.name: self.node(source)})

    def exchange(self, one, other):
        if not self.exchanges:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        super().exchange(one, other)
        self.node(one.parent).change(**{one.name: self.node(other), other.name: self.node(one)})

    def symlink(self, target, path):
        super().symlink(target, path)
        self.change(path, Link(target))

    def remove(self, path):
        super().remove(path)
        self.change(path, None)

    def remove_folder(self, path):
        super().remove_folder(path)
        self.change(path, None)


class Training:
    """Saves, marks and prunes on a Volatile disk; before each operation the power might fail."""

    def __init__(self, place, save, assert_same, exchanges):
        self.run, self.cut = place / "run", place / "cut"
        self.run.mkdir(parents=True)
        self.disk = Volatile(self.run, self.before, exchanges)
        self.save_to, self.assert_same = save, assert_same
        self.saved, self.best = 0, False
        self.count, self.trouble_at, self.trouble = 0, None, None
        self.random, self.num_random = random.Random(0), 1

    def go(self, steps):
        """As training does it: tidy, then save, mark and prune; an error on the disk ends one save."""
        store = Store(self.run, self.disk)
        store.tidy()
        for step, best in steps:
            try:
                self.save_to(store, step)
                self.saved = max(self.saved, step)
                if best:
                    store.mark_best(step)
                    self.best = True
                store.prune(1)
            except SaveFailed:
                pass

    def before(self, operation, *paths):
        self.count += 1
        since = None if self.trouble_at is None else self.count - 1 - self.trouble_at
        if since is not None and since >= 0 and self.trouble is Dead:
            raise Dead
        if since == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if since is None or 0 < since < 30:  # before it, all is as if undisturbed; later, it is forgotten
            self.look()

    def look(self):
        """What would be there if the power failed now."""
        least = lambda options: options[0]  # noqa: E731
        for choose in (least, *[self.random.choice] * self.num_random):
            self.disk.root.after_a_cut(self.cut, choose)
            in_use, files._in_use = files._in_use, set()  # after a cut nobody is at work
            try:
                self.check(Store(self.cut))
            finally:
                files._in_use = in_use
            shutil.rmtree(self.cut)

    def check(self, store):
        visible = store.steps()
        for step in visible:
            self.assert_same(store.load(step))
        store.tidy()
        assert set(store.steps()) >= set(visible)
        if self.saved:
            good, refused = store.newest_good()
            assert refused == [] and good.step >= self.saved
            self.assert_same(good)
        if self.best:
            assert store.best_step() is not None
        assert list(store.folder.glob(".tmp-*")) == []


STEPS = [(1, True), (2, False), (2, True), (3, False)]  # step 2 once more: it proved to be the best


@pytest.fixture(params=[True, False], ids=["exchange", "two-renames"])
def training(request, tmp_path, save, assert_same):
    """training(name): a new Training, on a disk that can swap two names and on one that cannot."""
    return lambda name: Training(tmp_path / name, save, assert_same, request.param)


def test_a_power_cut_at_any_operation_leaves_what_was_saved(training):
    undisturbed = training("undisturbed")
    undisturbed.num_random = amount(2, 20)
    undisturbed.go(STEPS)
    undisturbed.look()
    assert undisturbed.saved == 3 and undisturbed.count > 80


@pytest.mark.parametrize("trouble", [Dead, OSError])
def test_a_power_cut_after_a_kill_or_an_error_leaves_what_was_saved(training, trouble):
    undisturbed = training("undisturbed")
    undisturbed.trouble_at = 1_000_000  # never
    undisturbed.go(STEPS)
    for place in range(0, undisturbed.count, amount(67, 1)):
        disturbed = training(str(place))
        disturbed.trouble_at, disturbed.trouble = place, trouble
        try:
            disturbed.go(STEPS)
        except Dead:
            files._in_use.clear()
        else:
            assert trouble is OSError
        disturbed.look()
        disturbed.trouble_at = None
        disturbed.go([(4, True)])
        disturbed.look()
        assert disturbed.saved == 4
        shutil.rmtree(disturbed.run)
