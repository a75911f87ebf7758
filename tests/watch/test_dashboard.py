"""RunView -> dashboard: it fits its terminal, shows every group, and leaves the terminal clean."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from rich.cells import cell_len

from cllm_spheres import events
from cllm_spheres.spheres.memory import State
from cllm_spheres.watch import groups
from cllm_spheres.watch.dashboard import read, render, svg
from cllm_spheres.watch.plot import Curve, plot, spark, ticks
from cllm_spheres.watch.view import RunView
from tests.watch import fake

SIZES = [(80, 24), (160, 50), (100, 30), (120, 40), (40, 12), (64, 20), (63, 40), (250, 80)]


def text_of(view: RunView, width: int, height: int, **options) -> list[str]:
    lines = render(view, width, height, now=view.last_time or 0.0, **options)
    return ["".join(segment.text for segment in line) for line in lines]


def view_of(num_spheres: int, until: int = 400) -> RunView:
    view = RunView("amber-otter")
    for record in fake.records(num_spheres, until=until, eval_every=50):
        view.add(record)
    return view


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("num_spheres", [1, 2, 12, 63, 156])
def test_every_line_is_as_wide_as_the_terminal_and_the_height_is_filled(num_spheres, size):
    lines = text_of(view_of(num_spheres, 120), *size)
    assert {cell_len(line) for line in lines} == {size[0]}
    assert len(lines) == size[1]


@pytest.mark.parametrize("size", [(80, 24), (160, 50), (120, 40)], ids=str)
@pytest.mark.parametrize("num_spheres", [2, 63, 156])
def test_all_groups_and_numbers_are_there(num_spheres, size):
    lines = text_of(view_of(num_spheres), *size)
    text = "\n".join(lines)
    start = next(i for i, line in enumerate(lines) if "╭─ spheres" in line)
    below = " ".join(lines[start + 1 :]).replace("│", " ").split()
    for group in range(min(12, num_spheres)):
        assert str(group) in below, group
    for word in ("running", "step 400 / 2,000", "eta", "compute 83 %", "waiting 7 %", "unigram", "bigram",
                 "1493 %", "812 MB", "mean", "◆ validation"):  # fmt: skip
        assert word in text, word
    if (num_spheres, size) == (63, (160, 50)):  # a row a sphere where there is room
        for sphere in range(63):
            assert str(sphere) in below, sphere
    assert f"{num_spheres} spheres" in lines[0]


@pytest.mark.parametrize("num_spheres", range(1, 157))
def test_every_sphere_stands_in_one_group_under_its_level_1_sphere(num_spheres):
    members = groups.groups(num_spheres)
    assert sorted(k for group in members for k in group) == list(range(num_spheres))
    assert [group[0] for group in members] == list(range(min(12, num_spheres)))


def test_before_the_first_step_it_says_what_it_waits_for():
    empty = text_of(RunView(), 80, 24, notice="compiling kernels, once, about 20 s")
    assert any("compiling kernels, once, about 20 s" in line for line in empty)
    started = RunView()
    started.add(next(iter(fake.records(63))))
    assert any("waiting for the first step" in line for line in text_of(started, 80, 24))


def test_every_state_of_a_worker_has_its_word():
    assert groups._STATES.keys() == {state.name.lower() for state in State}
    view = view_of(63)
    assert view.spheres is not None
    view.spheres.state[:] = ["evaluating"] * 63
    for size in ((80, 24), (160, 50)):
        assert any("eval" in line for line in text_of(view, *size)), size


def test_without_colours_the_phases_are_told_apart_by_their_characters():
    lines = text_of(view_of(2), 80, 24, colour=False)
    bar = next(line for line in lines if "███" in line)
    assert {"█", "░", "▓", "▒"} <= set(bar)


def test_packing_is_named_only_where_it_takes_time():
    packing = RunView()
    for record in fake.records(2, until=50):
        packing.add(record | {"pack_s": record["seconds"] / 2} if record["kind"] == "step" else record)
    for view, named in ((packing, True), (view_of(2), False)):
        assert any("■ pack" in line for line in text_of(view, 80, 24)) is named


def test_a_word_run_has_no_bits_per_byte_and_still_draws():
    view = RunView()
    for record in fake.records(2, until=100, eval_every=50, bpb=False):
        view.add(record)
    lines = text_of(view, 80, 24)
    assert any("perplexity" in line for line in lines) and not any("bits/byte" in line for line in lines)


@pytest.mark.parametrize(
    ("num_spheres", "rows"),
    [
        (12, "12 groups: tokens/s, time waiting, state"),
        (63, "12 groups: a bar a sphere, tokens/s, time waiting, state"),
    ],
)
def test_words_are_written_out_in_the_smallest_terminal(num_spheres, rows):
    text = "\n".join(text_of(view_of(num_spheres), 80, 24))
    for words in ("training", "validation", "best", "bits/byte", "learn rate", "gradient    1.37", "tokens/s", "cpu",
                  " time  ■ compute", rows):  # fmt: skip
        assert words in text, words
    for word in ("bits/B", "uni/bi", "tok/s", "lr ", "ppl"):
        assert word not in text, word


def test_it_says_that_validation_has_turned_up():
    view = view_of(2)
    view.add(events.event("turned_up", "Up.", step=400, time=fake.START, best_step=350, best_loss=3.0))
    for size in ((80, 24), (160, 50)):
        assert any("validation has turned up" in line for line in text_of(view, *size))


def test_ticks_are_round_numbers_within_the_range():
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10] or ticks(0, 10, 6) == [0, 2, 4, 6, 8, 10]
    for low, high, most in ((0.1, 7.3, 4), (1, 1_000_000, 6), (2.1, 2.1001, 3), (-3, 3, 4)):
        values = ticks(low, high, most)
        assert 1 <= len(values) <= most
        assert all(low - 1e-9 <= v <= high + 1e-9 for v in values)


def test_a_plot_rises_where_its_curve_rises():
    lines = plot([Curve([(0, 0.0), (99, 1.0)], None)], [], 60, 12, (0, 99), (0.0, 1.0))
    rows = ["".join(s.text for s in line)[8:] for line in lines[:-1]]
    starts = [len(row) - len(row.lstrip()) for row in rows if row.strip()]
    assert len(starts) == 11 and starts == sorted(starts, reverse=True)
    assert spark([(i, float(i)) for i in range(80)], 8) == "▁▂▃▄▅▆▇█"


def test_the_picture_shows_the_run(tmp_path):
    run = fake.write(tmp_path / "amber-otter", list(fake.records(63, steps=200, eval_every=50)), torn='{"kind":"st')
    svg(run, tmp_path / "watch.svg", 120, 40)
    picture = (tmp_path / "watch.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg") and "amber-otter" in picture and "ended" in picture
    assert "url(http" not in picture and "@font-face" not in picture
    assert read(run).current_step == 200


def _in_a_terminal(code: str, run, end: bytes | None = None) -> tuple[int, str]:
    """Runs Python in a pseudo-terminal of 80x24, types `end` once it shows -> exit code, output."""
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    env.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run)],
        stdin=child,
        stdout=child,
        stderr=child,
        env=env,
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    os.close(child)
    output, deadline = b"", time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([parent], [], [], 0.1)[0]:
            try:
                data = os.read(parent, 65536)
            except OSError:
                break
            if not data:
                break
            output += data
            if end and b"spheres" in output:
                os.write(parent, end)
                end = None
        elif process.poll() is not None:
            break
    code_out = process.wait(timeout=10)
    os.close(parent)
    return code_out, output.decode(errors="replace")


def _own_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in a shell's background begins with it ignored
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


FOLLOW = "import sys; from pathlib import Path; from cllm_spheres_cli.watch import watch; "
FOLLOW += "watch(Path(sys.argv[1]), plain=False, svg=None, once=False); print('AFTER')"


def test_on_a_terminal_the_dashboard_ends_cleanly_with_the_run(tmp_path):
    run = fake.write(tmp_path / "amber-otter", list(fake.records(63, steps=120, eval_every=50)))
    code, output = _in_a_terminal(FOLLOW, run)
    assert code == 0, output
    _assert_clean(output)
    assert "ended" in output.rsplit("\x1b[?1049l", 1)[1]


def test_ctrl_c_leaves_the_dashboard_and_the_terminal_clean(tmp_path):
    run = fake.write(tmp_path / "amber-otter", list(fake.records(63, until=120, eval_every=50)))
    code, output = _in_a_terminal(FOLLOW, run, end=b"\x03")
    assert code == 0, output
    _assert_clean(output)
    assert "Traceback" not in output


def _assert_clean(output: str) -> None:
    """The other screen was entered and left, the cursor shown again, the last state printed after it."""
    assert output.count("\x1b[?1049h") == output.count("\x1b[?1049l") == 1
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l") >= 0
    after = output.rsplit("\x1b[?1049l", 1)[1]
    assert "step" in after and "spheres" in after and after.rstrip().endswith("AFTER")
