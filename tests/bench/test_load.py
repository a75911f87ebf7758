"""A short load: what the bench finds of a real server, and that it would tell if something were wrong."""

from __future__ import annotations

import json

import pytest
from cllm_spheres_bench.load import Options, run
from cllm_spheres_bench.load_http import Answer
from cllm_spheres_bench.load_report import leaks

from tests.runs import corpus, train_whole  # noqa: F401


@pytest.mark.bench
def test_many_clients_and_bad_ones_lose_nothing_and_leave_nothing(corpus, tmp_path, capsys):  # noqa: F811
    trained = train_whole(corpus, tmp_path / "run", steps=2, block_size=32).run
    options = Options(trained, clients=12, requests=3, tokens=24, bodies=300, slots=4, out=tmp_path)
    code = run(options)
    said = capsys.readouterr().out
    assert code == 0, said
    found = json.loads((tmp_path / "load.json").read_text())
    for side in ("calm", "disturbed"):
        assert sum(map(len, found[side]["latencies_s"].values())) == 36
    assert found["wrong"] == []
    assert sum(found["statuses"].values()) == 300 and found["statuses"].keys() <= {"200", "400", "404", "413", "429"}
    assert found["others"].keys() == {"left", "read nothing", "read slowly", "sent no HTTP"}
    assert "nothing leaked" in (tmp_path / "load.md").read_text()


def test_what_has_grown_is_named():
    before = {"server_bytes": 100, "tasks": 4, "descriptors": 8}
    assert leaks(before, {"server_bytes": 110, "tasks": 4, "descriptors": 7}) == []
    assert leaks(before, {"server_bytes": 111, "tasks": 5, "descriptors": 8}) == ["server_bytes", "tasks"]


def test_an_answer_that_is_no_error_of_openais_form_is_a_problem():
    good = json.dumps({"error": {"message": "no", "type": "t", "param": None, "code": None}}).encode()
    assert Answer(200, {}, b"", 0).problem((400,)) is None and Answer(400, {}, good, 0).problem((400,)) is None
    assert Answer(500, {}, good, 0).problem((400,)) and Answer(400, {}, b"oops", 0).problem((400,))
    assert Answer(400, {}, good.replace(b"no", b"Traceback"), 0).problem((400,))
