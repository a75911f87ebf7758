"""A folder that is held stays the same folder, whatever happens to its name."""

from __future__ import annotations

import os

import pytest

from cllm_spheres.checkpoint.held import Held
from cllm_spheres.errors import InputError


def test_what_is_written_follows_the_folder_to_its_new_name(run):
    held = Held(run)
    assert held.name == run and held.said(f"in {held.path}/checkpoints") == f"in {run}/checkpoints"
    renamed = run.rename(run.with_name("renamed"))
    run.mkdir()
    (held.path / "a").write_text("x")
    assert (renamed / "a").read_text() == "x" and not any(run.iterdir())
    assert held.name == renamed and held.identity != Held(run).identity
    assert held.said(f"in {held.path}: {held.path}0") == f"in {renamed}: {held.path}0"  # that is another descriptor


def test_its_name_is_written_as_it_was_given_where_that_leads_to_it(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    (run.parent / "link").symlink_to(run.name)
    for given in ("run", "./run/../run", "link"):
        assert str(Held(given).name) == str(type(run)(given))
    held, linked = Held("run"), Held("link")
    run.rename(run.with_name("renamed"))
    assert str(held.name) == str(linked.name) == "renamed"


def test_in_a_folder_that_was_removed_nothing_can_be_made(run):
    held = Held(run)
    run.rmdir()
    run.mkdir()
    with pytest.raises(FileNotFoundError):
        (held.path / "a").mkdir()
    assert held.name == run and not any(run.iterdir())


def test_it_is_let_go(run):
    held = Held(run)
    descriptor = int(held.path.name)
    held.close()
    with pytest.raises(OSError):
        os.fstat(descriptor)
    with pytest.raises(InputError, match=r"Cannot open the folder .*missing: No such file"):
        Held(run / "missing")
