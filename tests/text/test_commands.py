"""`prepare` and `data` as processes: words, exit codes, and what they leave behind."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

MAIN = """
import sys, typer
from cllm_spheres.errors import SpheresError
from cllm_spheres_cli.data import data
from cllm_spheres_cli.prepare import prepare
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(prepare)
app.command()(data)
try:
    app()
except SpheresError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
        **options,
    )


def run(*words, **options):
    """(exit code, what was printed, errors)."""
    process = start(*words, **options)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i} speaks of spheres [red] \x1b[31m\n" * 20)
    (folder / "x.bin").write_bytes(b"\0")
    return folder


def test_prepare_says_what_it_made_and_data_shows_it(corpus, tmp_path):
    code, out, error = run("prepare", corpus, "--tokenizer", "bpe", "--vocab-size", "300", "--out", tmp_path / "out")
    assert (code, error) == (0, "")
    assert "For validation: " in out and "of the tokens (10 % of the text asked for)." in out
    assert "30 documents" in out and "vocabulary of 300" in out
    assert f"Skipped: 1 binary: {corpus / 'x.bin'}" in out
    assert f"cllm-spheres train {tmp_path / 'out'}" in out
    code, out, error = run("data", tmp_path / "out")
    assert (code, error) == (0, "")
    for words in (
        "documents",
        "bytes/token",
        "vocabulary 300, end of text 299",
        "1 binary",
        "spheres [red]",
        "of the tokens (10 % of the text",
    ):
        assert words in out
    code, shown, error = run("data", tmp_path / "out", "--files")
    assert (code, error, len(shown.splitlines())) == (0, "", 31) and shown.count("  text, utf-8  ") == 30
    code, shown, _ = run("data", tmp_path / "out", "--files", "--skipped")
    assert code == 0 and shown.split() == ["skipped", "binary", "1", "-", str(corpus / "x.bin")]
    assert "\x1b[31m" not in out, "control characters of a text do not reach the terminal"


def test_bad_input_is_one_line_and_exit_code_2(corpus, tmp_path):
    for words in (
        ("prepare", tmp_path / "none", "--out", tmp_path / "out"),
        ("prepare", corpus, "--out", corpus),
        ("prepare", corpus, "--tokenizer", "byte", "--vocab-size", "5", "--out", tmp_path / "out"),
        ("data", tmp_path / "none"),
    ):
        code, out, error = run(*words)
        assert code == 2 and out == ""
        assert error.startswith("InputError: ") and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_bad_input_and_leaves_nothing(tmp_path):
    """A limit on the size of a file stands for the disk: the same path through the code."""
    (tmp_path / "a.txt").write_text("spheres all around " * 200_000)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    code, _, error = run("prepare", tmp_path / "a.txt", "--out", tmp_path / "new" / "out", preexec_fn=limit)
    assert code == 2
    assert error.startswith("InputError: Cannot prepare into") and "File too large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_nothing_half_written_and_no_process(tmp_path, number, code):
    text = "".join(f"{i} spheres kiss {i * i} others\n" for i in range(400_000))
    (tmp_path / "a.txt").write_text(text)
    process = start(
        "prepare", tmp_path / "a.txt", "--out", tmp_path / "out", "--processes", "2", start_new_session=True
    )
    workers = wait_for(lambda: psutil.Process(process.pid).children(recursive=True) if list_parts(tmp_path) else [])
    os.killpg(process.pid, number)  # as a terminal does it: to the workers too
    _, error = process.communicate(timeout=20)
    assert process.returncode == code, error
    assert "Stopped by" in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def list_parts(folder: Path):
    return [path for path in folder.glob(".out.preparing-*/work/*")]


def wait_for(condition, timeout_s=20):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.01)
    raise AssertionError("it never happened")


def test_a_library_call_needs_no_main_guard(tmp_path):
    (tmp_path / "a.txt").write_text("spheres all around\n" * 200_000)
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"
        "from cllm_spheres.text.prepare import prepare\n"
        f"print(prepare(['{tmp_path}/a.txt'], '{tmp_path}/out', vocab_size=270, processes=2).vocab_size)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "once\n270\n", done.stderr
    done = subprocess.run([sys.executable, "-"], input=script.read_text(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "once\n270\n", done.stderr


def test_a_worker_that_is_killed_is_an_error_that_says_so(tmp_path):
    from cllm_spheres.errors import RunFailed
    from cllm_spheres.text.pool import Pool

    with Pool(2) as pool:
        for worker in pool._workers:
            worker._process.kill()
        with pytest.raises(RunFailed, match=r"ended by signal 9 .*'read', reading a\.txt"):
            list(pool.map([{"do": "read", "files": [["a.txt", 0, None]]}] * 4))


def test_importing_the_commands_is_light():
    code = (
        "import sys, cllm_spheres_cli.prepare, cllm_spheres_cli.data;"
        "print([m for m in ('numpy', 'numba', 'tokenizers', 'rich.progress') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"
