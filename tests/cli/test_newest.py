"""Commands that take a run take the newest one in runs/ where none is given, and say which."""

from __future__ import annotations

import os

import pytest
from cllm_spheres_cli.app import app
from typer.testing import CliRunner

from cllm_spheres.errors import InputError


@pytest.fixture
def newest(tmp_path, monkeypatch):
    """The name of the newer of two runs that have nothing in them but an empty metrics.jsonl."""
    for name, time in (("first", 2_000_000_000), ("second", 1_900_000_000)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").touch()
        os.utime(tmp_path / "runs" / name / "metrics.jsonl", (time, time))
    monkeypatch.chdir(tmp_path)
    return "runs/first"


@pytest.mark.parametrize(
    "words", ["generate", "chat", "eval", "export model --to hf", "scale --workers 1", "train --resume", "serve"]
)
def test_the_newest_run_is_taken_and_named(newest, words, monkeypatch):
    if words == "serve":
        from cllm_spheres.web import server

        def serve(settings, say):
            raise InputError(str(*settings.setup.runs.values()))

        monkeypatch.setattr(server, "serve", serve)
    result = CliRunner().invoke(app, words.split())
    assert f"The newest run: {newest}" in result.stderr
    assert isinstance(result.exception, InputError) and newest in str(result.exception)


def test_watch_shows_the_newest_run(newest):
    result = CliRunner().invoke(app, ["watch", "--once", "--plain"])
    assert result.exit_code == 0 and f"The newest run: {newest}" in result.stderr


def test_export_does_not_take_a_lone_run_for_its_target(newest, tmp_path):
    (tmp_path / newest / "checkpoints").mkdir()
    result = CliRunner().invoke(app, ["export", newest, "--to", "hf"])
    assert isinstance(result.exception, InputError) and "The target is missing" in str(result.exception)
