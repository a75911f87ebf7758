"""`cllm-spheres chat`, by pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time

import pytest

from tests.runs import COMMAND, WAIT_S, corpus, text, train_whole  # noqa: F401


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):  # noqa: F811
    """A run with a block that a few turns fit in."""
    run = train_whole(corpus, tmp_path_factory.mktemp("chat") / "run", steps=40, block_size=96).run
    assert talk(run, "/exit").returncode == 0  # where the kernels are compiled now, it says so
    return run


def talk(run, *lines, **options):
    words = [COMMAND, "chat", run, "--tokens", "6"]
    return subprocess.run(words, input="\n".join(lines) + "\n", capture_output=True, text=True, errors="replace",
                          timeout=WAIT_S, **options)  # fmt: skip


def test_turns_come_from_a_pipe_and_answers_go_to_one(run, tmp_path):
    lines = ("Who?", "/again", "", "/set", "/set temperature 0", "/set top-k none", "/new", "/system A play.", "Who?",
             "one \\", "more", "/save talk.txt", "/exit", "never said")  # fmt: skip
    first, second = (talk(run, *lines[:2]), talk(run, *lines[:2]))
    assert first.returncode == 0 and first.stdout == second.stdout and first.stderr == ""
    whole = talk(run, *lines, cwd=tmp_path)
    assert whole.returncode == 0 and whole.stdout.startswith(first.stdout) and "temperature 0.8\n" in whole.stdout
    play = (tmp_path / "talk.txt").read_text(errors="replace")
    assert play.startswith("A play.\n\nUser: Who?\nAssistant:") and "\nUser: one \nmore\nAssistant:" in play
    assert "never said" not in play


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/agian", "There is no /agian: did you mean 'again'?"),
        ("/again", "There is nothing to answer yet."),
        ("/set temprature 1", "There is no option 'temprature': did you mean 'temperature'?"),
        ("/set temperature high", "temperature cannot be 'high': give a number."),
        ("/set tokens none", "tokens cannot be 'none'"),
        ("/set temperature -1", "--temperature -1.0 must be 0"),
        ("/save", "/save needs the name of a file."),
        ("/save /no/such/place", "/no/such/place cannot be written: No such file or directory."),
        ("x" * 200, "The last message take"),
    ],
)
def test_a_line_that_cannot_be_is_told_and_the_talk_goes_on(run, line, says):
    result = talk(run, line, "/help")
    assert result.returncode == 0 and says in result.stderr and "/undo" in result.stdout
    assert "Traceback" not in result.stderr


def test_on_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_talk(run, tmp_path):
    terminal, end = pty.openpty()
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"}
    words = [COMMAND, "chat", run, "--tokens", "10000000", "--top-k", "10"]  # the end of text is not among ten
    process = subprocess.Popen(
        words, stdin=end, stdout=end, stderr=end, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    os.close(end)
    shown = b""

    def until(is_there):
        nonlocal shown
        deadline = time.monotonic() + WAIT_S
        while not is_there():
            assert time.monotonic() < deadline, shown[-2000:]
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 65536)

    try:
        until(lambda: shown.endswith(b"> "))
        assert b"/help tells what else you can say" in shown
        os.write(terminal, b"Who?\n")
        until(lambda: len(shown) > 3000)  # far more than a prompt: the answer has no end
        before = len(shown)
        process.send_signal(signal.SIGINT)
        until(lambda: shown[before:].endswith(b"> "))
        os.write(terminal, b"\x04")
        deadline = time.monotonic() + WAIT_S
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    os.read(terminal, 65536)
                except OSError:  # the other end is closed
                    break
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    history = tmp_path / "cllm-spheres" / "chat_history"
    assert "Who?" in history.read_text() and history.stat().st_mode & 0o077 == 0
