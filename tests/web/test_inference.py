"""The process of inference by itself: what it says of a text, and of a model whose logits are none."""

from __future__ import annotations

import pytest

from cllm_spheres.errors import InputError, NonFinite
from cllm_spheres.inference.writer import Piece, Scored
from cllm_spheres.web.inference import LEAST, Service

OPTIONS = {"tokens": 5, "temperature": 0.0, "stop": [], "seed": 1, "score_prompt": False, "logprobs": None}


@pytest.fixture
def service(run):
    service = Service.of(str(run), None, 2, "fp32", None)
    yield service
    service.writer.close()


def order(number, prompt="ab", **more):
    return {"begin": number, "prompt": prompt, "sample": 0, "options": OPTIONS, "echo": False, "names": False} | more


def test_texts_are_told_by_the_ids_of_the_orders(service, alone):
    assert service.begin(order(70)) == {"id": 70, "begun": 2, "prompt": ""}
    assert service.begin(order(71, echo=True)) == {"id": 71, "begun": 2, "prompt": "ab"}
    told = [event for _ in range(5) for event in service.step()]
    for number in (70, 71):
        events = [event for event in told if event["id"] == number]
        assert "".join(e["text"] for e in events) == alone.text("ab", tokens=5, temperature=0)
        assert sum(event["new"] for event in events) == 5 and events[-1]["ended"] == "length"
    assert service.texts == {} and service.step() == []


def test_a_cancelled_text_is_not_told_of(service):
    service.begin(order(70))
    service.cancel(99)
    service.cancel(70)
    assert service.step() == [] and service.writer.free == 2


def test_logits_that_are_not_finite_refuse_what_is_being_written(service, monkeypatch):
    def fails():
        raise NonFinite("the logits are NaN")

    service.begin(order(70))
    service.begin(order(71))
    with monkeypatch.context() as patch:
        patch.setattr(service.writer, "step", fails)
        told = service.step()
    assert told == [{"id": id, "refused": "the logits are NaN", "status": 500} for id in (70, 71)]
    assert service.writer.free == 2
    service.begin(order(72))
    assert service.step()[0]["id"] == 72


def test_an_infinite_log_probability_becomes_a_number_that_json_has(service, monkeypatch):
    service.begin(order(70, names=True, options=OPTIONS | {"logprobs": 1}))
    (number,) = service.texts
    scored = Scored(97, -float("inf"), ((98, 0.0), (256, -float("inf"))))
    monkeypatch.setattr(service.writer, "step", lambda: [Piece(number, "a", (scored,), None, None)])
    assert service.step()[0]["scored"] == [["a", LEAST, [["b", 0.0], [None, LEAST]], 1]]


def test_prompts_that_are_too_long_are_refused_before_they_are_encoded(service, monkeypatch):
    monkeypatch.setattr(service.model.tokenizer, "encode", lambda text: pytest.fail("it was encoded"))
    with pytest.raises(InputError, match="65 characters"):
        service.begin(order(70, "a" * 65))
    with pytest.raises(InputError, match="block has 64"):
        service.begin({**order(70), "messages": [{"role": "user", "text": "a" * 65}]})
