"""The comparison with PyTorch: what is chosen, computed and printed; with PyTorch, that the losses are its."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from cllm_spheres_bench import children, machine, peers, peers_report, screening, sides
from cllm_spheres_bench.peer_torch import Order, Variant, learning_rate
from cllm_spheres_bench.sizes import SIZES, STEPS

from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.training import schedule
from tests.runs import command_here

ROOT = Path(__file__).resolve().parents[2]
HAS_TORCH = peers.importlib.util.find_spec("torch") is not None


def speed_of(variant: Variant) -> float:
    """A PyTorch whose best is compiled products with the erf GELU on one thread."""
    speed = 100.0 * (variant.mode == "compile") + 30 * (variant.attention == "matmul")
    return speed + 5 * (variant.gelu == "erf") + 2 * (variant.threads == 1) + 1


def test_screening_finds_the_best_mode_attention_gelu_and_threads():
    asked = []

    def measure(variant):
        asked.append(variant)
        return speed_of(variant)

    found = screening.screen(("eager", "compile"), "fp32", 4, measure)
    assert screening.fastest(found)[0] == Variant("fp32", "compile", "matmul", "erf", 1)
    assert len(asked) == screening.num_measurements(("eager", "compile"), 4)
    assert {v.threads for v in asked} == {1, 2, 4}


def test_screening_leaves_out_what_cannot_run_and_is_empty_where_nothing_can():
    def only_eager(variant):
        return speed_of(variant) if variant.mode == "eager" else None

    found = screening.screen(("eager", "compile"), "bf16", 2, only_eager)
    assert screening.fastest(found)[0] == Variant("bf16", "eager", "matmul", "erf", 1)
    assert screening.fastest(screening.screen(("compile",), "bf16", 2, only_eager)) == []


def test_a_finalist_keeps_the_better_of_its_two_figures():
    calls = []

    def measure(variant):
        calls.append(variant)
        return {"sdpa": 10.0, "matmul": 9.0}[variant.attention] - calls.count(variant)

    found = screening.screen(("eager",), "fp32", 1, measure)
    assert found[Variant("fp32", "eager", "sdpa", "tanh", 1)] == 9.0


def test_losses_are_compared_at_the_first_and_the_twentieth_step():
    ours, theirs = {1: 4.0, 2: 9.0, 20: 2.0}, {1: 4.0, 2: 1.0, 20: 2.5}
    assert peers.differences(ours, theirs) == {1: 0.0, 20: pytest.approx(0.2)}


def measured(speed, pss_bytes, loss):
    return sides.Measured(speed, 10.0, 5, 10.0, {"1 train": pss_bytes, "2 server": 1}, {1: 4.0, 20: loss}, 1.0)


class Turns(peers.Comparison):
    """A comparison whose turns are made up: less memory and less speed, the more is computed again."""

    def __init__(self, options, fails=()):
        super().__init__(options)
        self.asked, self.fails = [], fails

    def theirs(self, inputs, variant, **watching):
        self.asked.append("PyTorch" if watching.get("memory", True) else "screening")
        return measured(500.0 * len(self.asked), 400, 2.0)

    def ours(self, inputs, dtype, recompute, **watching):
        self.asked.append(recompute if watching.get("memory", True) else "warm-up")
        if recompute in self.fails and watching.get("memory", True):
            return f"{recompute} could not."
        speed, memory = {"none": (1000.0, 500), "cheap": (950.0, 400), "block": (750.0, 300)}[recompute]
        return measured(speed * len(self.asked), memory, 2.0 if recompute != "block" else 3.0)


def compared(*modes, **more):
    options = peers.Options([SIZES["S1"]], ["fp32"], repeats=2, modes=("eager",), recompute=modes)
    turns = Turns(options, **more)
    rows = turns.compare(sides.Inputs(SIZES["S1"], None, None), "fp32")
    return rows, [asked for asked in turns.asked if asked not in ("screening", "warm-up")]


def test_each_mode_of_recomputing_takes_its_turn_beside_pytorch():
    rows, turns = compared("none", "cheap", "block")
    assert turns == ["none", "cheap", "block", "PyTorch"] * 2
    assert [row["recompute"] for row in rows] == ["none", "cheap", "block"]
    assert [row["ours"]["pss_bytes"] for row in rows] == [501, 401, 301]
    assert {row["theirs"]["pss_bytes"] for row in rows} == {401}
    for row in rows:
        of_turns = zip(row["ours"]["turns"], row["theirs"]["turns"], strict=True)
        assert row["ratio"]["all"] == [a["tokens_per_s"] / b["tokens_per_s"] for a, b in of_turns]
    assert [row["losses_agree"] for row in rows] == [True, True, False]  # each mode's own losses are compared


def test_a_mode_that_fails_has_a_reason_and_no_ratio():
    (none, cheap), turns = compared("none", "cheap", fails=("cheap",))
    assert "ours" not in cheap and "ratio" not in cheap and "cheap could not." in cheap["reasons"]
    assert len(none["ratio"]["all"]) == 2 and turns.count("cheap") == 2


def test_the_schedule_in_pytorch_is_ours():
    config = SIZES["S3"].config
    order = Order(**{name: None for name in Order.__dataclass_fields__} | {
        name: getattr(config, name) for name in ("lr", "min_lr", "warmup", "steps")
    })  # fmt: skip
    for step in (1, config.warmup, config.warmup + 1, 12345, STEPS // 2, STEPS):
        # our cosine is a polynomial in float64
        assert learning_rate(step, order) == pytest.approx(schedule.learning_rate(step, config), rel=1e-12)


def test_spread_gives_median_range_and_every_value():
    assert machine.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}


def row(**changes):
    return {
        "size": "S1", "dtype": "fp32", "describe": "small", "workers": 2, "spheres": 2, "flops_per_token": 10**6,
        "reasons": [], "variant": "eager", "screening": [{"name": "eager", "tokens_per_s": 500.0}],
        "ours": {"tokens_per_s": machine.spread([1000.0, 1200.0, 1100.0]), "pss_bytes": 3 * 10**8},
        "theirs": {"tokens_per_s": machine.spread([500.0, 400.0, 550.0]), "pss_bytes": 4 * 10**8},
        "ratio": machine.spread([2.0, 3.0, 2.0]), "loss_differences": {1: 0.0, 20: 1e-5}, "losses_agree": True,
    } | changes  # fmt: skip


def result(*rows):
    peak = {"gflops": 10.0, "shape": [1, 1, 1], "by": "numpy"}
    return {
        **machine.facts("cllm-spheres bench peers"), "torch": "2.13.0", "repeats": 3, "seconds": 10.0, "notes": [],
        "peaks": {"fp32": {"1": {**peak, "gflops": 5.0}, "2": peak}}, "rows": list(rows),
    }  # fmt: skip


def test_the_share_of_the_peak_is_of_all_cores():
    peaks = result()["peaks"]
    assert peers_report.share_of_peak(row(), "ours", peaks) == pytest.approx(1100 * 1e6 / 10e9)
    assert peers_report.share_of_peak(row(), "ours", {}) is None


def test_the_report_shows_medians_ranges_ratios_memory_and_reasons():
    alone = row(size="S2", reasons=["S2 could not."])
    del alone["ours"], alone["ratio"], alone["loss_differences"], alone["losses_agree"]  # as `compare` leaves them out
    text = peers_report.report(result(row(), alone))
    assert "| S2 | – | 500 (400 to 550) | – | – | – | 5% | – | 400 MB | – |" in text
    assert "| S1 | 1,100 (1,000 to 1,200) | 500 (400 to 550) | **2.00** (2.00 to 3.00) | 2.20 | 11% | 5% |" in text
    assert "300 MB | 400 MB | 0e+00, 1e-05 |" in text
    assert "S2: S2 could not." in text and "| eager | **500** | **500** |" in text


def test_the_report_names_the_modes_of_recomputing_where_there_are_others_than_none():
    cheap = row(recompute="cheap", reasons=["Something."])
    cheap["ours"] = cheap["ours"] | {"pss_bytes": 2 * 10**8}
    text = peers_report.report(result(row(recompute="none", reasons=["Something."]), cheap))
    assert "| S1 | none | 1,100" in text and "300 MB | 400 MB |" in text
    assert "| S1 | cheap | 1,100" in text and "200 MB | 400 MB |" in text
    assert "A(none) A(cheap) B A(none) A(cheap) B" in text
    assert text.count("S1: Something.") == 1 and "| variant | S1 fp32 |" in text
    alone = peers_report.report(result(row()))
    assert "recompute" not in alone.lower() and "A B A B" in alone


def test_losses_that_do_not_agree_stand_out():
    assert "**0e+00, 1e-01**" in peers_report.report(
        result(row(loss_differences={1: 0.0, 20: 0.1}, losses_agree=False))
    )


def test_a_part_of_the_comparison_never_overwrites_the_whole():
    every = list(SIZES.values())
    assert peers.result_name(peers.Options(every, ["fp32", "bf16"])) == "peers"
    assert peers.result_name(peers.Options(every[:2], ["bf16"])) == "peers-S1-S2-bf16"


def test_more_workers_than_sequences_are_refused_by_name():
    comparison = peers.Comparison(peers.Options([SIZES["S1"]], ["fp32"], workers=5))
    with pytest.raises(InputError, match="S1 has a batch of 4"):
        comparison.workers_for(SIZES["S1"])


@pytest.mark.skipif(HAS_TORCH, reason="PyTorch is here")
def test_without_pytorch_the_command_says_how_to_get_it(tmp_path):
    result = command_here("bench", "peers", cwd=tmp_path)
    assert result.returncode == 2
    assert "pip install 'cllm-spheres[bench]'" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "S7"], ["'S7'", "did you mean"]),
        (["--dtypes", "fp16"], ["'fp16'", "did you mean"]),
        (["--modes", "fast"], ["'fast'", "known:"]),
        (["--recompute", "blocks"], ["'blocks'", "did you mean"]),
        (["--repeats", "0"], ["--repeats"]),
    ],
)
def test_what_is_not_known_is_named(arguments, words, tmp_path):
    result = command_here("bench", "peers", *arguments, cwd=tmp_path)
    assert result.returncode == 2 and all(word in result.stderr for word in words)
    assert "Traceback" not in result.stderr


def test_help_names_the_benchmarks_and_their_options(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "peers" in command_here("bench", "--help", cwd=tmp_path).stdout
    shown = command_here("bench", "peers", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    for option in (
        "--sizes", "--dtypes", "--repeats", "--seconds", "--workers", "--spheres", "--modes", "--recompute", "--out",
    ):  # fmt: skip
        assert option in shown.stdout


def test_results_go_where_they_are_told_and_a_folder_that_cannot_be_is_refused(tmp_path):
    assert machine.results_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--out"):
        machine.results_folder(tmp_path / "file")
    assert machine.results_folder(None) == ROOT / "bench" / "results"


def test_a_tree_of_processes_is_measured_together_and_ends_together(tmp_path):
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    process = psutil.Popen([sys.executable, "-c", code + "print(1, flush=True); time.sleep(600)"], stdout=-1)
    assert process.stdout.readline() == b"1\n"
    members = children.tree(process)
    assert len(members) == 2 and len(children.pss_bytes(process)) == 2
    assert sum(children.pss_bytes(process).values()) > 10**6  # two Pythons
    children.end_tree(process)
    assert not any(member.is_running() for member in members)
    assert children.tree(process) == [] or children.pss_bytes(process) == {}


def test_a_side_ends_with_whoever_started_it(tmp_path):
    child = "import os, sys, time; from cllm_spheres_bench.children import end_with; end_with(int(sys.argv[1]));"
    child += "print(os.getpid(), flush=True); time.sleep(600)"
    code = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, str(os.getpid())])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        side = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    side.wait(timeout=30)
    assert not side.is_running()


def fake_side(tmp_path, code):
    """A process that writes steps of 20 ms, each with the loss 1 / step."""
    metrics = tmp_path / "metrics.jsonl"
    script = (
        "import json, sys, time\nfile = open(sys.argv[1], 'a', buffering=1)\nstep = 0\n"
        "while True:\n    time.sleep(0.02); step += 1\n"
        f"    {code}\n"
        "    file.write(json.dumps(dict(kind='step', step=step, loss=1 / step, time=time.time())) + '\\n')\n"
    )
    said = (tmp_path / "said").open("wb")
    process = psutil.Popen([sys.executable, "-c", script, str(metrics)], stderr=said)
    return process, metrics, tmp_path / "said"


def test_a_side_is_watched_over_whole_steps_of_at_least_the_window(tmp_path):
    process, metrics, said = fake_side(tmp_path, "pass")
    try:
        found = sides.watch(SIZES["S1"], process, metrics, said, seconds=0.5, until_step=20)
    finally:
        children.end_tree(process)
    assert found.window_s >= 0.5 and found.window_steps >= 2
    assert found.tokens_per_s == pytest.approx(found.window_steps * 64 / found.window_s)
    assert found.losses == {step: 1 / step for step in range(1, 21)}
    assert sum(found.pss_bytes.values()) > 10**6


def test_a_side_that_ends_is_told_with_its_last_words(tmp_path):
    process, metrics, said = fake_side(tmp_path, "step < 9 or sys.exit('no more')")
    with pytest.raises(RunFailed, match=r"(?s)exit code 1.*no more"):
        sides.watch(SIZES["S1"], process, metrics, said, seconds=30)


def test_pytorch_starts_from_our_weights_and_makes_our_losses(tmp_path):
    pytest.importorskip("torch")
    inputs = sides.make_inputs(SIZES["S1"], tmp_path, 1.0)
    found = {}
    for name in ("ours", "theirs"):
        folder = tmp_path / name
        folder.mkdir()
        variant = Variant("fp32", "eager", "matmul", "tanh", 1)
        side = (
            sides.our_side(inputs, folder, "fp32", 2, 2)
            if name == "ours"
            else sides.their_side(inputs, folder, variant)
        )
        with side as (process, metrics):
            found[name] = sides.watch(
                inputs.size, process, metrics, folder / "said", seconds=0.5, until_step=20, memory=False
            ).losses
    assert found["ours"][20] < found["ours"][1] < 1.05 * math.log(381)  # it learns, from an even guess
    # float32 sums in another order: 1e-7 a step was measured
    assert max(peers.differences(found["ours"], found["theirs"]).values()) < 1e-5
