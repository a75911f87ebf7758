"""Records -> plain lines, and a run folder -> what `watch` shows without a terminal."""

from __future__ import annotations

import io
import re
import time
from datetime import UTC, datetime

import pytest
import typer
from cllm_spheres_cli.watch import watch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from cllm_spheres import events
from cllm_spheres.errors import InputError
from cllm_spheres.watch.follow import Follower, find_run, follow
from cllm_spheres.watch.plain import Plain, eval_line
from cllm_spheres.watch.reader import MOST_STEPS, NUM_WHOLE, Reader
from cllm_spheres.watch.view import RunView
from tests.watch import fake


def lines_of(records) -> list[str]:
    """The lines without the time of day that each begins with."""
    lines = timed_lines_of(records)
    assert all(re.match(r"\d\d:\d\d:\d\d  \S", line) for line in lines)
    return [line[10:] for line in lines]


def all_of(reader: Reader) -> list[events.Record]:
    """All that a reader finds now."""
    return [record for records in iter(reader.read, []) for record in records]


def timed_lines_of(records) -> list[str]:
    view, lines = RunView(), []
    plain = Plain(lines.append)
    for record in records:
        view.add(record)
        plain.add(record, view)
    plain.flush(view)
    return lines


def test_with_few_steps_every_step_has_its_line():
    lines = [line for line in lines_of(fake.records(2, steps=40, eval_every=10)) if line.startswith("step")]
    assert [re.match(r"step +(\d+)/40", line)[1] for line in lines] == [str(i) for i in range(1, 41)]


def test_with_many_steps_about_one_line_a_second_with_the_first_and_the_last():
    records = list(fake.records(2, steps=2000, step_s=0.01, eval_every=500))
    steps = [int(re.match(r"step +(\d+)/2000", li)[1]) for li in lines_of(records) if li.startswith("step")]
    assert steps[0] == 1 and steps[-1] == 2000 and 15 <= len(steps) <= 30
    assert {500, 1000, 1500} <= set(steps)  # the step of an evaluation stands before it


def test_a_long_run_has_about_a_thousand_lines_or_one_in_ten_seconds():
    records = fake.records(2, steps=20_000, step_s=0.1, until=6000, eval_every=5000)
    steps = [line for line in lines_of(records) if line.startswith("step")]
    assert 250 <= len(steps) <= 350


def test_a_line_holds_what_one_wants_to_know():
    lines = lines_of(fake.records(2, steps=2000, until=260, eval_every=250))
    step = next(line for line in lines if line.startswith("step") and " 250/2000" in line)
    assert re.fullmatch(r"step +250/2000  loss \d\.\d{4}  lr \d\.\de-\d\d  norm [\d.]+( > [\d.]+)?  "
                        r"\d+\.\dk tok/s  eta 2m\d\ds", step)  # fmt: skip
    evaluation = next(line for line in lines if line.startswith("eval"))
    assert re.fullmatch(r"eval  step 250  val \d\.\d{4}  ppl [\d.]+  bits/byte \d\.\d{3}  "
                        r"\(unigram 5\.310, bigram 3\.420\)", evaluation)  # fmt: skip
    assert "Saved step 250 in 0.02 s." in lines
    assert "bits" not in eval_line({"kind": "eval", "step": 1, "val_loss": 2.0, "bits_per_byte": None})


def test_a_line_begins_with_the_time_of_day_of_its_record(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    records = list(fake.records(2, steps=3, eval_every=3))
    told = {line[:8] for line in timed_lines_of(records)}
    monkeypatch.undo()
    time.tzset()
    assert told <= {f"{datetime.fromtimestamp(record['time'], UTC):%H:%M:%S}" for record in records}
    far = {"kind": "event", "event": "note", "message": "Late.", "time": 1e300}
    assert timed_lines_of([far]) == ["--:--:--  Late."]


def test_messages_cannot_move_the_cursor():
    lines = lines_of([events.event("failed", "bad\x1b[2J\nthing", step=1, time=0.0)])
    assert lines == ["bad [2J thing"]


def test_follow_prints_lines_where_there_is_no_terminal_and_ends_with_the_run(tmp_path):
    run = fake.write(tmp_path / "run", list(fake.records(2, steps=30, eval_every=10)), torn='{"kind":"ste')
    out = io.StringIO()
    view = follow(run, alive=lambda: True, console=Console(file=out))
    assert view.finished and view.current_step == 30
    assert "\x1b" not in out.getvalue() and "Done: 30 steps." in out.getvalue().splitlines()[-1]


def test_a_follower_shows_notices_before_the_run_exists_and_reads_what_is_left_at_the_end(tmp_path):
    run, out = tmp_path / "run", io.StringIO()
    with Follower(run, console=Console(file=out)) as follower:
        follower.notice("compiling kernels, once, about 20 s")
        follower.notice("compiling kernels, once, about 20 s")
        assert follower.poll().state(0.0) == "starting"
        fake.write(run, list(fake.records(2, steps=10, eval_every=5)))
    lines = out.getvalue().splitlines()
    assert sum("compiling kernels, once, about 20 s" in line for line in lines) == 1
    assert lines[0][10:].startswith("compiling") and lines[-1].endswith("  Done: 10 steps.")
    assert follower.view.current_step == 10


def test_keyboard_interrupt_goes_through_after_the_last_line(tmp_path):
    run, out = fake.write(tmp_path / "run", list(fake.records(2, until=70))), io.StringIO()

    def alive() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(run, alive=alive, console=Console(file=out))
    assert "70/2000" in out.getvalue().splitlines()[-1]


def test_config_toml_fills_in_what_the_events_do_not_say(tmp_path):
    run = fake.write(tmp_path / "run", [])
    (run / "config.toml").write_text('steps = 77\nspheres = 5\noptimizer = "sgd"\n', encoding="utf-8")
    with Follower(run, console=Console(file=io.StringIO())) as follower:
        assert (follower.view.steps, follower.view.num_spheres) == (77, 5)


def test_a_folder_that_is_no_run_is_refused_with_the_nearest_one(tmp_path):
    fake.write(tmp_path / "runs" / "amber-otter", [])
    fake.write(tmp_path / "runs" / "green-heron", [])
    for wrong in (tmp_path / "runs" / "amber-oter", tmp_path / "runs" / "amber-otter-2"):
        with pytest.raises(InputError, match=r"Did you mean .*amber-otter"):
            find_run(wrong)
    with pytest.raises(InputError, match=r"is not the folder of a run.*Did you mean"):
        find_run(tmp_path / "runs")
    with pytest.raises(InputError, match="cllm-spheres train"):
        find_run(tmp_path / "nothing" / "here")
    assert find_run(tmp_path / "runs" / "green-heron").name == "green-heron"


def test_fast_steps_are_thinned_but_the_first_and_the_last_and_all_others_are_read(tmp_path):
    records = list(fake.records(2, steps=900, eval_every=100))
    reader = Reader(fake.write(tmp_path / "run", records[:600]) / "metrics.jsonl")
    assert len(all_of(reader)) < 600
    fake.write(tmp_path / "run", records)
    later = all_of(reader)
    steps = [r["step"] for r in later if r["kind"] == "step"]
    assert steps[-1] == 900 and len(steps) <= 2 * MOST_STEPS
    assert [r for r in later if r["kind"] != "step"] == [r for r in records[600:] if r["kind"] != "step"]
    short = all_of(Reader(fake.write(tmp_path / "short", fake.records(2, steps=NUM_WHOLE)) / "metrics.jsonl"))
    assert sum(r["kind"] == "step" for r in short) == NUM_WHOLE


@given(st.binary(max_size=300), st.integers(0, 400))
def test_broken_and_torn_lines_never_raise(tmp_path_factory, junk, cut):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    good = "".join(events.dumps(r) + "\n" for r in fake.records(2, until=3)).encode()
    reader, view = Reader(path), RunView()
    path.write_bytes(good[:cut])
    first = all_of(reader)
    path.write_bytes(good + junk + b"\n" + good)
    for record in first + all_of(reader):
        view.add(record)
    assert view.current_step == 3


def test_the_command_shows_a_run_once_and_writes_its_picture_and_refuses_bad_input(tmp_path):
    run = str(fake.write(tmp_path / "amber-otter", list(fake.records(2, until=30))))
    app = typer.Typer()
    app.command()(watch)

    def call(*arguments: str):
        return CliRunner().invoke(app, arguments)

    shown = call(run, "--once")
    assert shown.exit_code == 0 and "30/2000" in shown.output.splitlines()[-1]
    assert call(run, "--svg", str(tmp_path / "a.svg")).exit_code == 0 and (tmp_path / "a.svg").exists()
    for arguments, message in (
        ((run + "s",), "Did you mean"),
        ((run, "--svg", "/nothing/here.svg"), "Cannot write"),
    ):
        error = call(*arguments).exception
        assert isinstance(error, InputError) and message in str(error) and error.exit_code == 2
