"""The comparison of neighbours by context: alikeness by hand, each choice is what it says, and a small run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cllm_spheres_bench import crystal_contexts as benchmark

from cllm_spheres.crystal.similarity import nearest
from cllm_spheres.errors import InputError
from cllm_spheres.text.frequency import frequency_order
from cllm_spheres.text.prepared import Prepared
from tests.runs import char_corpus, text  # noqa: F401


def test_alikeness_is_that_of_counted_distributions(char_corpus):  # noqa: F811
    prepared = Prepared.open(char_corpus)
    alike = benchmark.alikeness(prepared)
    ids, tokens = frequency_order(prepared)[0].tolist(), prepared.train.tolist()

    def around(token, side):
        found = [tokens[i + side] for i in range(len(tokens)) if tokens[i] == token and 0 <= i + side < len(tokens)]
        return np.array([found.count(other) / len(found) for other in ids])

    for a, b in ((0, 1), (3, 30), (5, 5)):
        expected = np.mean([np.sqrt(around(ids[a], side) * around(ids[b], side)).sum() for side in (-1, 1)])
        assert alike[a, b] == pytest.approx(expected, rel=1e-12)


def test_each_choice_is_16_others():
    alike = np.random.default_rng(0).random((70, 70))
    found = benchmark.choices(alike, 80)
    own = np.arange(70)[:, None]
    for name, ranks in found.items():
        assert ranks.shape == (70, 16) and ranks.min() >= 0 and ranks.max() < 80, name
        assert (ranks != own).all(), name
    assert (found["crystal"] == nearest(80, 16)[0][:70] - 1).all()
    assert np.abs(found["nearest in rank"] - own).max() == 16 and np.abs(found["nearest in rank"] - own)[20].max() == 8
    assert (found["most alike there are"][:, 0] == np.argmax(alike - 2 * np.eye(70), axis=1)).all()


def test_what_does_not_occur_does_not_count():
    alike = np.array([[1.0, 0.2], [0.4, 1.0]])
    assert benchmark.means(alike, np.array([[1, 5], [0, 0]]))["mean"] == pytest.approx((0.2 + 0.4) / 2)
    assert benchmark.means(alike, np.array([[7, 5], [0, 0]]))["mean"] == pytest.approx(0.4)


def test_a_small_run_writes_its_table(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(text(300))
    words = [str(tmp_path / "text.txt"), "--vocab-size", "300", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["crystal_contexts", *words])
    benchmark.main()
    found = json.loads((tmp_path / "out/crystal_contexts.json").read_text())["vocabularies"]["300"]
    values = {name: line["mean"] for name, line in found["lines"].items()}
    assert values["most alike there are"] > max(value for name, value in values.items() if name[0] != "m")
    assert all(f"| {name} |" in (tmp_path / "out/crystal_contexts.md").read_text() for name in values)


def test_too_little_text_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("abab\n" * 50)
    with pytest.raises(InputError, match="too few for 16 neighbours"):
        benchmark.measure([tmp_path / "text.txt"], 257)
