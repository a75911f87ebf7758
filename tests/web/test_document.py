"""What docs/serving.md shows works, and its tables are those of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/serving.md").read_text()


def parameters(heading):
    """The names in the first column of the table below a heading."""
    table = re.split(r"^#+ ", DOCUMENT.split(f"### {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize(("heading", "path"), [
    ("Parameters of completions", "/v1/completions"), ("Parameters of a chat", "/v1/chat/completions"),
])  # fmt: skip
def test_the_parameters_are_those_that_are_known(served, heading, path):
    body = {"model": "run", "messages": [{"role": "user", "content": "a"}], "Q" * 40: 1}
    if "chat" not in path:
        del body["messages"]
    message = served.post(path, **body).json()["error"]["message"]
    assert set(message.partition("known: ")[2].split(", ")) == parameters(heading)


def test_the_example_of_the_client_runs(served, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    changed = example.replace("http://127.0.0.1:8000", served.url).replace('"books"', '"run"')
    assert changed != example
    exec(compile(changed, "docs/serving.md", "exec"), {})
    assert len(capsys.readouterr().out) > 60


def test_the_bodies_of_the_curl_commands_are_answered(served):
    asked = re.findall(r"http://127\.0\.0\.1:8000(/\S+) .*?-d '(.*?)'", DOCUMENT, re.DOTALL)
    assert len(asked) == 2
    for path, body in asked:
        assert served.post(path, **json.loads(body) | {"model": "run"}).status_code == 200


def test_the_metrics_are_those_that_are_shown(served):
    served.complete(max_tokens=2)
    shown = re.findall(r"^# TYPE (\w+)", served.client.get("/metrics").text, re.MULTILINE)
    assert set(shown) == set(re.findall(r"`(cllm_\w+)`", DOCUMENT))
