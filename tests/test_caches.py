"""One folder for compiled kernels and prepared text: the wanted one, else one in the temporary folder, else none."""

from __future__ import annotations

import fcntl
import os

import pytest

from cllm_spheres import caches
from cllm_spheres.doctor import needs
from cllm_spheres.errors import InputError
from cllm_spheres.text.cache import cache_folder


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A home and a temporary folder of the test's own; either becomes a file where nothing can be kept."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(caches.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    return tmp_path


def close(folder):
    folder.rmdir()
    folder.touch()


def test_kernels_and_text_go_to_the_home_folder_also_where_that_lies_below_the_temporary_one(places, monkeypatch):
    monkeypatch.setenv("HOME", str(places / "temporary" / "home"))
    assert caches.folder() == caches.wanted() == places / "temporary" / "home" / ".cache" / "cllm-spheres"
    assert cache_folder() == caches.wanted() / "prepared"
    assert needs.look_at_text_cache()[0] == "ok"


def test_text_follows_the_kernels_where_the_home_folder_cannot_be_written_and_the_doctor_says_why(places, monkeypatch):
    from cllm_spheres.crystal import jit

    close(places / "home")
    other = places / "temporary" / f"cllm-spheres-{os.getuid()}"
    assert cache_folder() == other / "prepared"
    kernels = jit._cache_folder()
    assert kernels.parent == other / "kernels"
    monkeypatch.setattr(jit, "CACHE_FOLDER", kernels)
    for look in (needs.look_at_kernel_cache, needs.look_at_text_cache):
        state, found, advice = look()
        assert state == "note" and "home/.cache/cllm-spheres cannot be made: Not a directory" in found
        assert "may be emptied" in advice and "XDG_CACHE_HOME" in advice


def test_where_nothing_can_be_kept_the_doctor_does_not_say_that_training_will_work(places):
    close(places / "home")
    close(places / "temporary")
    assert caches.folder() is None
    with pytest.raises(InputError, match=r"Prepared text cannot be kept: .* XDG_CACHE_HOME"):
        cache_folder()
    state, found, advice = needs.look_at_text_cache()
    assert state == "bad" and "cannot be made" in found and "prepare PATH --out DIR" in advice


def test_a_folder_of_another_user_is_not_used(places, monkeypatch):
    monkeypatch.setattr(caches.os, "getuid", lambda: 12345)
    assert caches.problem(places / "home") == f"{places / 'home'} belongs to another user"


def test_a_folder_that_is_looked_at_or_cleared_meanwhile_is_used_a_moment_later(tmp_path, monkeypatch):
    place = tmp_path / "kernels"
    place.mkdir()
    other = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(other, fcntl.LOCK_EX)  # as whoever clears the cache does
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            place.rename(tmp_path / "aside")
            os.close(other)

    monkeypatch.setattr(caches.time, "sleep", sleep)
    descriptor = caches.use(place)
    assert descriptor is not None and os.path.samestat(os.fstat(descriptor), place.stat())
    os.close(descriptor)
    assert len(slept) == 3
