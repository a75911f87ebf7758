"""A folder of runs -> where each stands, from what lies in it; nothing is trained here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from cllm_spheres_cli.runs import runs as command

import cllm_spheres as cs
from cllm_spheres.checkpoint.lock import Lock, is_held
from cllm_spheres.errors import InputError
from cllm_spheres.events import event
from cllm_spheres.text.tokenizer import ByteTokenizer
from tests.exchange.models import make_run
from tests.watch import fake


def start(step=0, time=1e9, **more):
    return event("resume" if step else "start", "", step=step, time=time, steps=40, **more)


def step(number, time, seconds=1.0, tokens=64):
    return {"kind": "step", "step": number, "loss": 9.0, "cross_entropy": 5.0 - number / 10, "tokens": tokens,
            "seconds": seconds, "total_tokens": 64 * number, "time": time}  # fmt: skip


def evaluation(number, loss):
    return {"kind": "eval", "step": number, "val_loss": loss, "time": 1e9 + number}


@pytest.fixture
def folder(tmp_path):
    """Runs of every state."""
    made = {
        "resumed": [start(), evaluation(0, 6.0), *(step(n, 1e9 + n) for n in range(1, 30)), evaluation(20, 2.0),
                    start(10, 1e9 + 60), *(step(n, 1e9 + 50 + n, seconds=2.0) for n in range(11, 13)),
                    evaluation(12, 3.0), event("end", "", step=12, time=1e9 + 70, reason="signal")],
        "done": [start(), step(1, 1e9), event("end", "", step=1, time=1e9 + 2, reason="done")],
        "early": [start(), step(1, 1e9), event("end", "", step=1, time=1e9 + 3, reason="early_stop")],
        "failed": [start(), step(1, 1e9), event("failed", "", step=1, time=1e9 + 4, error="NonFinite")],
        "killed": [start(), step(1, 1e9 + 5)],
        "going": [start(), step(1, 1e9 + 6)],
    }  # fmt: skip
    for name, lines in made.items():
        fake.write(tmp_path / name, lines, torn='{"kind":"step","st')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/metrics.jsonl").write_bytes(b'[1]\n\xff\n{"kind":"step","step":"a"}\n{"kind":"eval"}\n')
    make_run(tmp_path / "imported", ByteTokenizer())
    (tmp_path / "no run").mkdir()
    return tmp_path


def test_each_run_is_a_flat_record_the_last_changed_at_the_end(folder):
    (folder / "killed/lock").write_text("99\n")
    with Lock(folder / "going"):
        assert is_held(folder / "going") and not is_held(folder / "killed") and not is_held(folder / "done")
        records = cs.runs(str(folder))
    found = {record["name"]: record for record in records}
    assert {name: record["state"] for name, record in found.items()} == {
        "resumed": "stopped", "done": "finished", "early": "stopped early", "failed": "failed", "killed": "cut off",
        "going": "running", "broken": "cut off", "imported": "imported",
    }  # fmt: skip
    one = found["resumed"]
    assert (one["step"], one["steps"], one["total_tokens"]) == (12, 40, 768)
    assert math.isclose(one["loss"], 3.8) and (one["val_loss"], one["best_val_loss"]) == (3.0, 3.0)
    assert one["tokens_per_s"] == 32.0 and one["changed"] == 1e9 + 70  # of the steps since its resume
    assert found["imported"]["step"] == 3 and found["broken"]["step"] is None
    written = sum(path.stat().st_size for path in (folder / "imported").rglob("*") if path.is_file())
    assert found["imported"]["size_bytes"] == written > 0
    assert [r["name"] for r in records][:6] == ["done", "early", "failed", "killed", "going", "resumed"]
    assert {tuple(record) for record in records} == {tuple(one)}
    assert all(isinstance(value, str | int | float | None) for value in one.values())


def test_the_command_shows_a_table_or_json(folder, capsys):
    command(folder)
    shown = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert shown["resumed"][1:7] == ["stopped", "12/40", "3.8000", "3.0000", "3.0000", "32"]
    assert shown["run"][-2:] == ["tokens/s", "size"] and len(shown) == 9
    command(folder, as_json=True)
    assert json.loads(capsys.readouterr().out) == cs.runs(folder)


def test_a_run_that_cannot_be_read_hides_no_other(folder, monkeypatch):
    real = Path.open

    def refuses(path, *arguments, **options):
        if path == folder / "done/metrics.jsonl":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuses)
    states = {record["name"]: record["state"] for record in cs.runs(folder)}
    assert states["done"] == "unreadable" and states["failed"] == "failed"


def test_where_there_is_no_run_that_is_said(tmp_path, capsys):
    command(tmp_path)
    assert f"There is no run in {tmp_path}. Train one" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(InputError, match=r"There is no folder .*nowhere"):
        cs.runs(tmp_path / "nowhere")
    with pytest.raises(InputError, match="folder is 5, of type int: give a path"):
        cs.runs(5)
