"""Wishes of other commands: who is heard, and who cannot keep others from being heard."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from cllm_spheres.errors import InputError
from cllm_spheres.training import control
from cllm_spheres.training.control import Control, ask


@pytest.fixture
def going(tmp_path):
    """going(): a Node Zero that fulfils every wish at once."""

    def begin():
        wished = threading.Event()
        one = Control(tmp_path, wished.set)

        def fulfil():
            while wished.wait():
                wished.clear()
                if wish := one.take():
                    wish.answer(message=f"So it is: {wish.message}")

        threading.Thread(target=fulfil, daemon=True).start()
        return one

    return begin


def taken(run, number):
    """A socket that has one of the run's names."""
    other = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other.bind(control.addresses(run)[number])
    return other


def test_who_connects_and_says_nothing_holds_nobody_up(going, tmp_path, monkeypatch):
    going()
    monkeypatch.setattr(control, "ANSWERS_WITHIN_S", 2.0)  # less than a silent one is waited for
    monkeypatch.setattr(control, "MOST_SILENT", 3)
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(5)]
    for one in silent:
        one.connect(control.addresses(tmp_path)[0])
        assert ask(tmp_path, {"workers": 2}) == "So it is: {'workers': 2}"
    assert silent[0].recv(1) == b""  # the eldest of too many is sent away
    for one in silent:
        one.close()


def test_a_name_that_somebody_else_has_taken_keeps_nobody_from_being_heard(going, tmp_path, monkeypatch):
    with taken(tmp_path, 0), taken(tmp_path, 1) as stranger:
        stranger.listen()
        assert going().reachable
        user_of, asked = control._user_of, []

        def first_is_a_stranger(connection):
            asked.append(connection)
            return os.getuid() + 1 if len(asked) == 1 else user_of(connection)

        monkeypatch.setattr(control, "_user_of", first_is_a_stranger)
        assert ask(tmp_path, {"save": True}) == "So it is: {'save': True}"
        assert stranger.accept()[0].recv(100) == b""  # it was told nothing


def test_a_run_whose_names_are_all_taken_is_not_reachable_and_goes_on(tmp_path):
    others = [taken(tmp_path, number) for number in range(control.NAMES)]
    assert not Control(tmp_path, lambda: None).reachable
    with pytest.raises(InputError, match="No run is going on"):
        ask(tmp_path, {"save": True})
    for other in others:
        other.close()


def test_another_user_is_refused(going, tmp_path, monkeypatch):
    going()
    monkeypatch.setattr(control, "_user_of", lambda connection: os.getuid() + 1)
    other = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other.connect(control.addresses(tmp_path)[0])
    assert b"This run is another user's." in other.recv(1000)
    other.close()
