"""Verdicts: intervals against known values, comparisons by hand, and a report from made-up results."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from cllm_spheres_bench import crystal_cost, crystal_mass, crystal_plot, crystal_report, crystal_shard
from cllm_spheres_bench.crystal_compare import Comparison, Curves, at, best_alpha, corrected
from cllm_spheres_bench.crystal_grid import Cell, Corpus, losses
from cllm_spheres_bench.crystal_stats import Interval, holm, interval, t_quantile, two_sided_p
from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres.config import merge
from cllm_spheres.text.frequency import frequency_order
from cllm_spheres.training.soft_targets import loss_options, table
from tests.runs import text

PLAIN, LATTICE = Cell(), Cell(init="lattice")
CRYSTAL, RANDOM = Cell("crystalline", 0.1), Cell("random", 0.1)


# ---- statistics


def test_quantiles_are_those_of_the_tables():
    for df, quantile in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (1000, 1.9623)):
        assert t_quantile(0.975, df) == pytest.approx(quantile, abs=5e-5)  # as many digits as the tables have
    assert t_quantile(0.995, 4) == pytest.approx(4.6041, abs=5e-5)


@given(t=st.floats(0, 30), df=st.integers(1, 60))
def test_p_is_the_area_of_the_density_beyond_t(t, df):
    x = np.linspace(0, t, 20_001)
    front = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    inside = 2 * np.trapezoid(front * (1 + x**2 / df) ** (-(df + 1) / 2), x)
    assert two_sided_p(t, df) == pytest.approx(1 - inside, abs=1e-6)  # the trapezoids' own error at this spacing


def test_the_interval_of_a_worked_example():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.half is not None and found.p is not None
    # sd sqrt(2.5), t 2.7764 with 4 degrees of freedom; p of t = 3 / sqrt(0.5) = 4.2426
    assert (found.mean, found.n) == (3.0, 5) and found.half == pytest.approx(2.7764 * math.sqrt(0.5), abs=1e-4)
    assert found.p == pytest.approx(0.01324, abs=1e-5) and found.sign == 1
    assert interval([-x for x in (1.0, 2.0, 3.0, 4.0, 5.0)]).sign == -1 and interval([-1.0, 1.2]).sign == 0


def test_intervals_hold_the_truth_as_often_as_they_say():
    samples = np.random.default_rng(1).normal(2.0, 3.0, (4000, 3))
    found = [interval(row.tolist()) for row in samples]
    share = np.mean([abs(one.mean - 2.0) <= one.half for one in found])
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)  # four standard deviations of the count


def test_one_value_has_no_interval_and_equal_values_have_an_empty_one():
    assert interval([2.5]) == Interval(2.5, None, 1, None) and interval([2.5]).sign == 0
    assert interval([0.0, 0.0]) == Interval(0.0, 0.0, 2, 1.0)
    assert interval([0.5, 0.5]) == Interval(0.5, 0.0, 2, 0.0) and interval([0.5, 0.5]).sign == 1


def test_holm_raises_p_values_in_their_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


# ---- comparisons


def record(cell: Cell, seed: int, *curve: float, **more) -> dict:
    steps = [100 * (i + 1) for i in range(len(curve))]
    return {
        "kind": "run", "loss": cell.loss, "alpha": cell.alpha, "init": cell.init, "seed": seed,
        "curve": [list(point) for point in zip(steps, curve, strict=True)], **more,
    }  # fmt: skip


def test_a_loss_between_evaluations_lies_on_the_line_between_them():
    curve = [[100, 5.0], [200, 4.0], [300, 3.5]]
    assert [at(curve, step) for step in (50, 100, 150, 200, 250, 300, 400)] == [5, 5, 4.5, 4, 3.75, 3.5, 3.5]


def test_differences_are_of_the_same_seed():
    curves = Curves([
        record(PLAIN, 1, 3.0), record(PLAIN, 2, 4.0), record(PLAIN, 3, 9.0),
        record(CRYSTAL, 1, 2.9), record(CRYSTAL, 2, 3.9), record(CRYSTAL, 4, 0.0),
    ])  # fmt: skip
    found = curves.difference(CRYSTAL, PLAIN)
    assert found and found.n == 2 and found.mean == pytest.approx(-0.1)
    assert found.half == pytest.approx(0, abs=1e-12)  # though the seeds themselves differ by 1
    assert curves.difference(RANDOM, PLAIN) is None and curves.mean(RANDOM) is None


def test_at_equal_time_a_dearer_loss_is_read_earlier_and_a_cheaper_one_at_its_end():
    curves = Curves([record(PLAIN, 1, 5.0, 3.0), record(CRYSTAL, 1, 5.0, 3.0)])
    dearer, cheaper = curves.equal_time(CRYSTAL, 1.25), curves.equal_time(CRYSTAL, 0.8)
    assert dearer and dearer.mean == pytest.approx(0.8)  # step 160 of 200: 5 - 2 * 0.6 = 3.8
    assert cheaper and cheaper.mean == 0


def test_pooled_differences_are_means_over_pairs_within_a_seed():
    curves = Curves([
        record(PLAIN, 1, 3.0), record(PLAIN, 2, 3.0), record(CRYSTAL, 1, 3.1), record(CRYSTAL, 2, 3.3),
        record(RANDOM, 1, 3.3), record(RANDOM, 2, 3.1),
    ])  # fmt: skip
    found = curves.pooled([(CRYSTAL, PLAIN), (RANDOM, PLAIN)])
    assert found and found.n == 2 and found.mean == pytest.approx(0.2) and found.half == pytest.approx(0, abs=1e-12)
    assert curves.pooled([(CRYSTAL, LATTICE)]) is None and curves.pooled([]) is None


def test_the_best_alpha_has_the_lowest_mean_over_initialisations():
    cells = [Cell("crystalline", alpha, init) for alpha in (0.1, 0.3) for init in ("gpt2", "lattice")]
    found = [record(cell, 1, loss) for cell, loss in zip(cells, (3.0, 3.4, 3.1, 3.2), strict=True)]
    assert best_alpha(Curves(found), "crystalline", (0.1, 0.3)) == 0.3
    assert best_alpha(Curves(found[:-1]), "crystalline", (0.1, 0.3)) is None
    assert best_alpha(Curves([]), "crystalline", (0.1,)) is None


def test_a_verdict_is_by_the_interval_and_its_star_by_holm():
    values = [Interval(-0.2, 0.1, 5, 0.001), Interval(0.2, 0.1, 5, 0.04), Interval(0.1, 0.2, 5, 0.3)]
    found = corrected([Comparison((str(i),), value) for i, value in enumerate(values)])
    assert [one.verdict for one in found] == ["better*", "worse", "no difference"]
    assert corrected([Comparison((), Interval(1.0, None, 1, None))])[0].verdict == "one seed"


# ---- the report


COST = {
    "kind": "cost", "preset": "small", "dtype": "fp32", "vocab_size": 1024, "load_before": 0.1,
    "arithmetic": {
        "cross-entropy": {"seconds": 0.005, "ratio": 1.0, "low": 1.0, "high": 1.0},
        "crystalline": {"seconds": 0.006, "ratio": 1.075, "low": 1.0745, "high": 1.08},
    },
    "turns": {"cross-entropy": [0.010, 0.020], "crystalline": [0.011, 0.021]},
}  # fmt: skip


def part(**changes) -> crystal_report.Part:
    """A made-up grid: the crystal 0.1 worse than cross-entropy, random neighbours 0.1 worse than the crystal."""
    made = [
        record(Cell(loss, None if loss == "cross-entropy" else 0.1, init), seed, 5.0, 3.0 + less + 0.01 * seed * wobble)
        for loss, less in (("cross-entropy", 0.0), ("crystalline", 0.1), ("smoothing", 0.0), ("random", 0.2))
        for init, wobble in (("gpt2", 1 + less), ("lattice", 1 - less)) for seed in (1, 2, 3)
    ]  # fmt: skip
    values = dict(
        preset="small", steps=200, dtype="fp32", cells=losses((0.1,)), inits=("gpt2", "lattice"),
        corpora={"words": Curves(made)}, tokens={"words": 5000}, missing=0, pictures={"words": "words.svg"},
        masses={"words": {"the text itself": 0.5, "crystalline": 0.4}},
    )  # fmt: skip
    return crystal_report.Part(**{**values, **changes})


HEAD = {"machine": "CPU", "cores": 2, "system": "Linux", "commit": "abc", "date": "2026-11-21", "command": "bench"}


def row(report: str, *cells: str) -> list[str]:
    """The cells after those that a row of a table begins with."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in report.splitlines()]
    (found,) = [found[len(cells) :] for found in rows if found[: len(cells)] == list(cells)]
    return found


def test_the_report_says_of_every_cell_what_came_out():
    report = crystal_report.markdown_of(HEAD, [part()], [COST])
    assert row(report, "crystalline less cross-entropy, gpt2") == ["+0.1020 ± 0.0025: worse"]
    assert row(report, "crystalline less random, lattice") == ["-0.0980 ± 0.0025: better"]
    assert row(report, "lattice less gpt2, with cross-entropy") == ["+0.0000 ± 0.0000: no difference"]
    # -0.002 and -0.004 times the seed with two of four losses: -0.0015 times 1, 2, 3
    assert row(report, "lattice less gpt2, mean over all losses") == ["-0.0030 ± 0.0037: no difference"]
    seeds, loss, difference, verdict, p, equal_time = row(report, "crystalline 0.1", "gpt2")
    # 3 + 0.1 + 0.011 * (1, 2, 3): mean 3.122, t 4.3027 * 0.011 / sqrt(3) = 0.0273
    assert (seeds, loss, difference) == ("3", "3.1220 ± 0.0273", "+0.1020 ± 0.0025")
    assert verdict == "worse*" and float(p.removeprefix("< ")) < 0.05
    # 7.5 % dearer in the median: step 186.05 of 200, 13.95 % of the way back from 3.122 to 5; cross-entropy has 3.02
    assert equal_time.startswith("+0.3640")
    assert row(report, "smoothing 0.1", "gpt2")[2:] == ["+0.0000 ± 0.0000", "no difference", "1.000", "not measured"]
    assert row(report, "crystalline 0.1 less random", "lattice")[1] == "better*"
    assert row(report, "random 0.1", "lattice less gpt2")[:2] == ["-0.0080 ± 0.0099", "no difference"]
    assert row(report, "small, fp32") == [
        "1,024", "crystalline", "5.00 ms", "+7.50% (+7.45% to +8.00%)", "15.00 ms", "+7.5% (+5.0% to +10.0%)", "0.1",
    ]  # fmt: skip
    assert "![Curves of small on words](words.svg)" in report and "not done" not in report
    assert "get: of the text itself 50%, of crystalline 40%." in report
    assert report.count("## small") == 1 and "On 5,000 tokens." in report


def test_the_report_of_half_a_grid_says_what_is_missing():
    made = Curves([record(PLAIN, 1, 3.0), record(CRYSTAL, 1, 3.1)])
    report = crystal_report.markdown_of(HEAD, [part(corpora={"words": made}, missing=6, pictures={})], [])
    assert "**6 runs are not done.**" in report and "Not measured yet" in report
    assert row(report, "crystalline 0.1", "gpt2") == ["1", "3.1000", "+0.1000", "one seed", "", "not measured"]
    nothing = crystal_report.markdown_of(HEAD, [part(corpora={"words": Curves([])}, missing=8)], [])
    assert "**8 runs are not done.**" in nothing and "| cross-entropy" not in nothing


def test_ratios_are_within_a_round():
    assert crystal_cost.ratio(COST, "crystalline") == 1.075 and crystal_cost.ratio(COST, "cross-entropy") == 1.0
    assert crystal_cost.ratio(None, "crystalline") is None and crystal_cost.ratio(COST, "random") is None
    taken = {"cross-entropy": [1.0, 2.0, 4.0], "crystalline": [1.1, 2.4, 4.0]}
    assert crystal_cost.ratios_of(taken, "crystalline") == pytest.approx([1.1, 1.2, 1.0])
    found = crystal_shard.summary(taken)["crystalline"]
    assert (found["seconds"], found["ratio"], found["rounds"]) == (2.4, pytest.approx(1.1), 3)
    assert (found["low"], found["high"]) == (1.0, pytest.approx(1.2))


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(2000):
        noise = np.exp(rng.normal(0, 0.5, 60))  # skewed, of median 1
        found = crystal_shard.summary({"cross-entropy": [1.0] * 60, "random": noise.tolist()})["random"]
        held += found["low"] <= 1 <= found["high"]
    assert held / 2000 > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 2000)  # four standard deviations of the count below


def test_what_the_most_frequent_get_is_counted_over_the_text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(text(100))
    prepared = Corpus("words", path).prepared("minimal")
    found = crystal_mass.shares(prepared, "minimal")
    ids = prepared.train.tolist()
    frequent = [token for token, _ in Counter(ids).most_common(100)]  # 63 characters: all that the text has
    assert found["the text itself"] == sum(token in frequent for token in ids) / len(ids) == 1.0
    assert found["smoothing"] == 100 / 257
    config = merge({"preset": "minimal", "loss": "random"})[0].model_copy(update={"vocab_size": 257})
    config = config.model_copy(update=loss_options(config, 257))
    ids_VK, weights_VK = table(config, prepared)
    order = frequency_order(prepared)[0][:100].tolist()
    slow = [sum(float(w) for j, w in zip(ids_VK[t], weights_VK[t], strict=True) if j in order) for t in ids]
    assert found["random"] == pytest.approx(sum(slow) / len(slow), abs=1e-6)  # weights are float32
    assert found["crystalline"] > found["random"]


def test_a_picture_has_every_line_and_the_bands_of_the_differences(tmp_path):
    pytest.importorskip("matplotlib")
    own = part()
    crystal_plot.draw(tmp_path / "a.svg", "title", own.corpora["words"], own.cells, own.inits)
    crystal_plot.draw(tmp_path / "b.svg", "title", own.corpora["words"], own.cells, own.inits)
    picture = (tmp_path / "a.svg").read_text()
    assert picture == (tmp_path / "b.svg").read_text() and len(picture) < 300_000
    for words in ("crystalline 0.1", "random 0.1", "embeddings: lattice", "less cross-entropy"):
        assert words in picture
    steps, values = crystal_plot.points(own.corpora["words"], CRYSTAL, PLAIN)
    assert steps == [100, 200] and [value.mean for value in values] == pytest.approx([0.0, 0.102])
