"""What lies in the caches, what of it is in use, and that clearing them removes that alone which nobody uses."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time

import pytest
from cllm_spheres_cli.cache import cache as command

from cllm_spheres import caches
from cllm_spheres.doctor import cached
from cllm_spheres.text.cache import prepare_cached


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(caches.tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    return tmp_path / "cache" / "cllm-spheres"


def put(folder, content="code"):
    """A folder of an hour ago with a file in it."""
    folder.mkdir(parents=True)
    (folder / "file").write_text(content)
    age(folder / "file")
    age(folder)
    return folder


def age(path):
    """Let it be of an hour ago."""
    hour_ago = time.time() - 3600
    os.utime(path, (hour_ago, hour_ago))


def names(found):
    return {os.path.basename(one.path) for one in found}


def test_what_nobody_uses_is_removed_and_nothing_else(place, tmp_path, capsys):
    assert cached.contents() == [] and not place.exists()
    (tmp_path / "text").write_text("Some words.\n" * 9)
    prepared = prepare_cached([tmp_path / "text"], "byte")  # its tokens are mapped while this object lives
    forgotten = prepare_cached([tmp_path / "text"], "char").folder
    outside = put(tmp_path / "outside")
    used, old = place / "kernels" / ("1" * 16), put(place / "kernels" / ("2" * 16))
    descriptor = caches.use(used)
    (place / "kernels" / ("3" * 16)).symlink_to(outside)
    (place / "prepared" / ("4" * 32)).symlink_to(outside)
    others = [put(place / "kernels" / "notes"), put(place / "prepared" / "mine"), put(place / "something")]
    left = put(place / "prepared" / f".{'5' * 32}.preparing-00")  # of a process that was killed
    being_made = put(place / "prepared" / f".{'6' * 32}.preparing-00")
    lock = (being_made / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    age(being_made)

    found = {os.path.basename(one.path): one for one in cached.contents()}
    assert found.keys() == {
        used.name,
        old.name,
        prepared.folder.name,
        forgotten.name,
        left.name,
        being_made.name,
        "keys",
    }
    assert {name for name, one in found.items() if one.in_use} == {used.name, prepared.folder.name, being_made.name}
    assert found[old.name].size_bytes == 4 and found[old.name].changed == (old / "file").stat().st_mtime
    assert found[forgotten.name].about == f"char, {tmp_path / 'text'}"
    command()
    shown = capsys.readouterr().out
    assert str(place) in shown and old.name in shown and re.search(r"1h0\dm +0 kB +2{16}", shown) and "in use" in shown
    command(as_json=True)
    assert {os.path.basename(one["path"]) for one in json.loads(capsys.readouterr().out)} == found.keys()

    command(clear=True)
    told = capsys.readouterr().out
    kinds = "1 folder of compiled kernels, 1 prepared text, 1 unfinished folder, 1 list of texts prepared so far"
    assert f"freed: {kinds}." in told and "Left, because" in told
    assert names(cached.contents()) == {used.name, prepared.folder.name, being_made.name}
    assert all((folder / "file").is_file() for folder in (outside, *others))
    os.close(descriptor)
    lock.close()
    del prepared
    assert cached.clear()[1] == [] and cached.contents() == []


def test_a_linked_folder_of_the_cache_is_left_alone(place, tmp_path):
    kernels = put(tmp_path / "elsewhere" / ("1" * 16))
    place.mkdir(parents=True)
    (place / "kernels").symlink_to(kernels.parent)
    assert cached.contents() == [] and cached.clear() == ([], []) and (kernels / "file").exists()


def test_a_folder_that_is_cleared_while_somebody_begins_to_use_it_is_made_again(place, monkeypatch):
    folder, flock, cleared = place / "kernels" / ("1" * 16), fcntl.flock, []

    def clears_first(descriptor, kind):
        if not cleared:
            cleared.append(folder.rename(folder.with_name(".removed-0")))
        flock(descriptor, kind)

    monkeypatch.setattr(caches.fcntl, "flock", clears_first)
    descriptor = caches.use(folder)
    assert os.path.samestat(os.fstat(descriptor), folder.stat()) and caches.is_used(folder)
    os.close(descriptor)
    assert not caches.is_used(folder)


def test_the_kernels_of_this_process_are_in_use():
    from cllm_spheres.crystal.jit import CACHE_FOLDER

    assert caches.is_used(CACHE_FOLDER)
