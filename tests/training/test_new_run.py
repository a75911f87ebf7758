"""A run whose text is still being prepared: it is there, says how far it is, and is gone where nothing comes of it."""

from __future__ import annotations

import pytest

from cllm_spheres.errors import InputError
from cllm_spheres.events import PREPARING, read
from cllm_spheres.text.prepare import SHARES
from cllm_spheres.training import new_run, session
from cllm_spheres.training.control import ask
from cllm_spheres.training.folder import read_config
from cllm_spheres.training.new_run import NewRun, preparing
from cllm_spheres.watch import dashboard
from cllm_spheres.watch.follow import find_run
from cllm_spheres.watch.overview import overview
from cllm_spheres.watch.plain import Plain
from tests.faults.malformed import MODEL as OPTIONS

OPTIONS = OPTIONS | {"steps": 3, "tokenizer": "byte"}


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(new_run, "TELLS_EVERY_S", 0.0)
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(f"some words of document {i}\n" * 30)
    return tmp_path / "text"


def test_who_looks_at_a_run_sees_how_far_its_text_is(text, tmp_path):
    run, seen = tmp_path / "runs" / "run", []

    def look(stage, done, total):
        assert find_run(run) == run
        view = dashboard.read(run)
        assert view.state(view.last_time) == preparing(run) == view.messages[-1][2].partition(":")[0].lower()
        assert len(view.messages) == 1, "only how far it is now"
        with pytest.raises(InputError, match=rf"The run in {run} is preparing text, \d+ %\. Ask it again"):
            ask(run, {"workers": 2})
        assert overview(run).state == "preparing text"
        with pytest.raises(InputError, match="A run is going on in"):
            session.new_run(text, OPTIONS, run=run, file=None)
        seen.append(read(run / "metrics.jsonl")[-1]["share"])

    plan = session.new_run(text, OPTIONS, run=run, file=None, progress=look)
    assert seen == sorted(seen) and seen[0] == 0 and 0 < seen[len(seen) // 2] < 1
    records = read(run / "metrics.jsonl")
    assert {record["event"] for record in records} == {PREPARING} and records[-1]["share"] == 1
    assert records[-1]["message"].startswith("The text is prepared after") and preparing(run) == ""
    assert dashboard.read(run).state(records[-1]["time"]) == "starting"
    lines = []
    plain = Plain(lines.append)
    for record in records:
        plain.add(record, dashboard.read(run))
    assert len(lines) == 2 and "Preparing text, 0 %: comparing" in lines[0], "one in ten seconds"
    plain = Plain(lines.append)
    for record in records[:4]:
        plain.add(record, dashboard.read(run))
    plain.flush(dashboard.read(run))
    assert lines[2] == lines[0] and records[3]["message"] in lines[3], "and the latest, where one looks once"
    again = session.new_run(text, OPTIONS, run=tmp_path / "again", file=None)
    assert again.prepared.folder == plan.prepared.folder
    assert sorted(path.name for path in again.run.iterdir()) == ["config.toml", "lock"], "its text was there already"


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_nothing_is_left_of_a_run_that_does_not_come_about(text, tmp_path, monkeypatch, error):
    def stop(stage, done, total):
        if stage == "tokens":
            raise error("enough")

    with pytest.raises(error, match="enough"):
        session.new_run(text, OPTIONS, run=tmp_path / "runs" / "run", file=None, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(error, match="enough"):
        session.new_run(text, OPTIONS, run=tmp_path / "mine", file=None, progress=stop)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["lock"]


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_run_that_is_renamed_while_its_text_is_prepared_leaves_its_successor_alone(text, tmp_path, succeeds):
    run, renamed, successors = tmp_path / "run", tmp_path / "renamed", []

    def rename(stage, done, total):
        if stage == "tokens" and not successors:
            run.rename(renamed)
            successors.append(session.new_run(text, OPTIONS | {"seed": 2}, run=run, file=None))
            if not succeeds:
                raise InputError("enough")

    if succeeds:
        assert session.new_run(text, OPTIONS, run=run, file=None, progress=rename).run == renamed
        assert read_config(renamed)[0].seed == 1337 and read(renamed / "metrics.jsonl")[-1]["share"] == 1
    else:
        with pytest.raises(InputError, match="enough"):
            session.new_run(text, OPTIONS, run=run, file=None, progress=rename)
        assert not renamed.exists()
    assert read_config(run)[0].seed == 2 and read(run / "metrics.jsonl")[-1]["share"] == 1
    assert [record["share"] for record in read(run / "metrics.jsonl")].count(1) == 1


def test_a_run_whose_maker_was_killed_while_it_prepared_its_text_begins_anew(text, tmp_path):
    run = tmp_path / "run"
    killed = NewRun(run, None)
    killed.progress("read", 1, 2)
    with pytest.raises(InputError, match="A run is going on in"):
        session.make_plan(text, OPTIONS, run=run, resume="auto")
    killed._lock.release()  # as the kernel does it
    assert preparing(run) == "" and overview(run).state == "cut off"
    plan, finished = session.make_plan(text, OPTIONS, run=run, resume="auto")
    assert finished is None and read(run / "metrics.jsonl")[0]["share"] == 0
    with pytest.raises(InputError, match="exists already"):
        NewRun(plan.run, None)


def test_the_share_of_a_stage_never_goes_back():
    shares = [new_run._share(stage, within) for stage in SHARES for within in (0, 0.5, 1)]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0, 0.99)
