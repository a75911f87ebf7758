"""`bench crystal`: what a results file survives; a small grid is trained once, also where it is interrupted."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cllm_spheres_bench import crystal, crystal_grid, crystal_report
from cllm_spheres_bench.crystal_grid import Cell, Corpus, Records, Task, claimed, losses, tasks
from cllm_spheres_bench.machine import facts

import cllm_spheres
from cllm_spheres.errors import InputError
from cllm_spheres.model.dtypes import usable
from tests.runs import WAIT_S, begin, text, wait_until
from tests.runs import command as run_command

PLAIN, LATTICE = Cell(), Cell(init="lattice")
CRYSTAL, RANDOM = Cell("crystalline", 0.1), Cell("random", 0.1)


# ---- the grid


def task(**changes) -> Task:
    return replace(Task(Corpus("text"), "small", CRYSTAL, 1, 100, 5000, "fp32", "f00d"), **changes)


def test_a_key_names_all_that_bits_depend_on():
    others = [
        task(preset="medium"), task(cell=PLAIN), task(cell=RANDOM), task(cell=Cell("crystalline", 0.3)),
        task(cell=Cell("crystalline", 0.1, "lattice")), task(seed=2), task(steps=200), task(eval_tokens=6000),
        task(fingerprint="beef"),
    ]  # fmt: skip
    assert len({one.key for one in (task(), *others)}) == 10
    assert (task(dtype="bf16").key == task().key) == (usable("bf16") == "fp32")  # what is computed in counts
    assert task().key == task(corpus=Corpus("other name")).key


def test_another_lattice_or_another_similarity_is_another_experiment(monkeypatch):
    cells = [PLAIN, Cell("smoothing", 0.1), LATTICE, CRYSTAL, RANDOM]
    before = [task(cell=cell).key for cell in cells]
    crystal_grid.crystal_of.cache_clear()
    monkeypatch.setattr(crystal_grid, "features", lambda count, width: np.zeros((count, width), np.float32))
    after = [task(cell=cell).key for cell in cells]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, True, True]
    crystal_grid.crystal_of.cache_clear()
    monkeypatch.setattr(crystal_grid, "nearest", lambda count, *_: (np.zeros((count, 16), np.int32), None))
    after = [task(cell=cell).key for cell in cells]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, False, False]
    crystal_grid.crystal_of.cache_clear()


def test_the_grid_has_every_cell_and_a_seed_at_a_time(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some text\n" * 100)
    corpora = [Corpus("one", path), Corpus("two", path)]
    cells = [*losses((0.1, 0.3)), LATTICE]
    found = tasks(corpora, "minimal", cells, 2, 10, 100, "fp32")
    assert len(cells) == 8 and len(found) == 2 * 2 * 8
    assert [one.seed for one in found] == [1] * 16 + [2] * 16
    assert found[0].options == {
        "preset": "minimal", "steps": 10, "seed": 1, "dtype": "fp32", "eval_tokens": 100, "eval_every": 1,
        "save_every": 10, "keep": 1,
    }  # fmt: skip
    assert {"loss": "crystalline", "alpha": 0.1, "neighbours": 16}.items() <= found[1].options.items()
    assert {"loss": "smoothing", "alpha": 0.3}.items() <= found[4].options.items()
    assert "neighbours" not in found[4].options and found[7].options["init"] == "lattice"


def test_a_results_file_survives_a_torn_line(tmp_path):
    records = Records(tmp_path / "crystal.jsonl")
    assert records.read() == []
    records.append({"kind": "run", "key": "a", "x": 1})
    with records.path.open("ab") as file:
        file.write(b'{"kind": "run", "key": "b", "x')
    assert records.runs().keys() == {"a"}
    records.append({"kind": "run", "key": "c"})
    records.append({"kind": "cost", "preset": "small", "dtype": "fp32", "x": 1})
    records.append({"kind": "cost", "preset": "small", "dtype": "fp32", "x": 2})
    assert records.runs().keys() == {"a", "c"} and records.costs()["small", "fp32"]["x"] == 2
    assert len(records.path.read_text().splitlines()) == 4


@pytest.mark.parametrize("line", ["no json", "[1]", "{}", "3"])
def test_a_file_that_is_something_else_is_refused(tmp_path, line):
    path = tmp_path / "crystal.jsonl"
    path.write_text(f'{{"kind": "run", "key": "a"}}\n{line}\n')
    with pytest.raises(InputError, match="line 2 is no result"):
        Records(path).read()


def test_lines_of_several_writers_stay_whole(tmp_path):
    records = Records(tmp_path / "crystal.jsonl")
    writers = [
        threading.Thread(target=lambda n=n: [records.append({"kind": "run", "key": f"{n}-{i}"}) for i in range(20)])
        for n in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(records.runs()) == 80


def test_a_run_is_claimed_by_one_at_a_time(tmp_path):
    with claimed(tmp_path / "work" / "run") as first:
        with claimed(tmp_path / "work" / "run") as second:
            assert (first, second) == (True, False)
        with claimed(tmp_path / "work" / "other") as other:
            assert other
    with claimed(tmp_path / "work" / "run") as again:
        assert again
    assert list((tmp_path / "work").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), claimed(tmp_path / "file" / "run"):
        pass


# ---- the command


def test_what_cannot_be_is_refused(tmp_path):
    for words, said in (("0.1,x", "not a list"), ("0,0.1", "above 0"), ("1.5", "at most 1"), ("nan", "above 0")):
        with pytest.raises(InputError, match=said):
            crystal.alphas_of(words)
    assert crystal.alphas_of("0.3, 0.1,0.1") == (0.1, 0.3)
    for options, said in (
        (crystal.Options(embedded=False), "must be a --text"),
        (crystal.Options(texts=(tmp_path / "a.txt",)), "no such file"),
        (crystal.Options(texts=(Path("a/b.txt"), Path("b.txt"))), "one name"),
    ):
        with pytest.raises(InputError, match=said):
            crystal.corpora_of(options)
    with pytest.raises(InputError, match="There is no preset"):
        crystal.run(crystal.Options(preset="smal", out=tmp_path))


def test_the_command_in_a_result_has_no_folders():
    words = ["cllm-spheres", "bench", "crystal", "--text", "/a/b/text.txt", "--out=/a/b", "--alphas", "0.1"]
    assert crystal.without_folders(words) == "cllm-spheres bench crystal --text text.txt --out=b --alphas 0.1"


# ---- end to end


def options(folder: Path, text: Path, **more) -> crystal.Options:
    """The smallest grid and final that there are."""
    values = dict(
        texts=(text,), embedded=False, only=("grid", "final"), preset="minimal", final_preset="minimal",
        alphas=(0.1,), seeds=2, final_seeds=1, steps=20, eval_tokens=200, dtype="fp32", workers=1,
        work=folder / "work", out=folder,
    )  # fmt: skip
    return crystal.Options(**{**values, **more})


@pytest.fixture
def words(tmp_path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(text(100))
    return path


def done(one: Task) -> dict:
    """A record of a run as though it had been trained."""
    cell = one.cell
    return {
        "loss": cell.loss, "alpha": cell.alpha, "init": cell.init, "seed": one.seed, "tokens": 5,
        "curve": [[0, 4.0], [20, 3.0]],
    }  # fmt: skip


def curves(folder: Path) -> dict[str, list]:
    """What must not depend on interruptions: key -> curve."""
    return {key: record["curve"] for key, record in Records(folder / "crystal.jsonl").runs().items()}


def test_a_grid_of_one_initialisation_is_trained_and_reported(words, tmp_path, capsys):
    own = options(tmp_path / "out", words, only=("grid",), inits=("gpt2",), seeds=1)
    assert crystal.run(own) == 0
    report = (own.out / "crystal.md").read_text()
    assert report in capsys.readouterr().out and str(tmp_path) not in report
    found = curves(own.out)
    assert len({curve[-1][1] for curve in found.values()}) == len(found) == 4  # no option is ignored
    assert list(own.work.iterdir()) == []


@pytest.mark.bench
def test_a_small_grid_is_trained_once_and_reported(words, tmp_path, monkeypatch, capsys):
    own = options(tmp_path / "out", words)
    assert crystal.run(own) == 0
    report = (own.out / "crystal.md").read_text()
    assert report in capsys.readouterr().out and "not done" not in report and str(tmp_path) not in report
    found = curves(own.out)
    # 2 seeds of 8 cells; the final is of the same preset here, so that its runs are those of the grid
    assert len(found) == 16 and all([step for step, _ in curve] == list(range(0, 21, 2)) for curve in found.values())
    assert len({curve[-1][1] for curve in found.values()}) == 16  # no option is ignored
    assert list(own.work.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(crystal_grid, "train", None)
        assert crystal.run(own) == 0  # nothing is trained again
    assert (own.out / "crystal.md").read_text() == report
    assert crystal.run(replace(own, seeds=3)) == 0  # a seed more is 8 runs more
    assert len(curves(own.out)) == 24 and found.items() <= curves(own.out).items()


def test_the_lattice_alone_is_reported_too(words, tmp_path):
    own = options(tmp_path, words, only=(), inits=("lattice",))
    found = {one.key: done(one) for one in crystal.grid_tasks(own, crystal.corpora_of(own))}
    part = crystal._part(crystal.grid_tasks(own, crystal.corpora_of(own)), found, own.inits, None)
    assert [cell.loss for cell in part.cells] == ["cross-entropy", "crystalline", "smoothing", "random"]
    report = crystal_report.markdown_of(facts("bench"), [part], [])
    assert "| crystalline 0.1 | lattice | 2 | 3.0000 ± 0.0000 |" in report and "| gpt2 |" not in report


@pytest.mark.bench
def test_a_grid_that_was_interrupted_goes_on_to_the_same_numbers(words, tmp_path):
    own = options(tmp_path / "whole", words, only=("grid",), inits=("gpt2",), seeds=1, steps=3000)
    assert crystal.run(own) == 0
    command = (
        "bench", "crystal", "--no-embedded", "--text", words, "--only", "grid", "--inits", "gpt2", "--preset",
        "minimal", "--final-preset", "minimal", "--alphas", "0.1", "--seeds", 1, "--steps", 3000, "--eval-tokens", 200,
        "--dtype", "fp32", "--workers", 1, "--work", tmp_path / "work", "--out", tmp_path / "parts",
    )  # fmt: skip
    process = begin(*command)
    wait_until(lambda: len(list((tmp_path / "work").glob("*/metrics.jsonl"))) == 1, "the first run")
    wait_until(lambda: len(curves(tmp_path / "parts")) >= 1, "the first result")
    wait_until(lambda: any((tmp_path / "work").glob("*/metrics.jsonl")), "the second run")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=WAIT_S)
    done = curves(tmp_path / "parts")
    assert process.returncode == 130 and "the same command goes on there" in said and "Traceback" not in said
    assert 1 <= len(done) < 4
    again = run_command(*command)
    assert again.returncode == 0 and f"4 runs, {len(done)} are done." in again.stderr, again.stderr
    assert curves(tmp_path / "parts") == curves(own.out)


@pytest.mark.bench
def test_a_run_that_was_begun_goes_on_and_a_damaged_one_begins_anew(words, tmp_path):
    one = Task(Corpus("words", words), "minimal", CRYSTAL, 1, 40, 200, "fp32")
    whole = crystal_grid.train(one, tmp_path / "whole", 1)["curve"]
    prepared = one.corpus.prepared("minimal")
    cllm_spheres.train(prepared.folder, run=tmp_path / "begun", quiet=True, workers=1, stop_at=10, **one.options)
    assert crystal_grid.train(one, tmp_path / "begun", 1)["curve"] == whole
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.toml").write_text("steps = 3\n")
    assert crystal_grid.train(one, tmp_path / "damaged", 1)["curve"] == whole
    assert not any((tmp_path / name).exists() for name in ("whole", "begun", "damaged"))


@pytest.mark.bench
def test_the_cost_of_every_loss_is_measured_in_turn(words, tmp_path, capsys):
    own = options(tmp_path / "out", words, only=("cost",), cost_presets=("minimal",), rounds=2, seconds=0.01)
    assert crystal.run(own) == 0
    measured = Records(own.out / "crystal.jsonl").costs()
    assert ("minimal", "fp32") in measured
    for found in measured.values():
        assert list(found["turns"]) == ["cross-entropy", "crystalline", "smoothing", "random"]
        assert all(len(turns) == 2 and min(turns) > 0 for turns in found["turns"].values())
        assert all(found["arithmetic"][loss]["rounds"] >= 10 for loss in found["turns"])
    assert "| minimal, fp32 | 257 | crystalline |" in (own.out / "crystal.md").read_text()
    assert not (own.work / "cost").exists()
