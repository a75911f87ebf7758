"""The process of inference by itself: what it says of a text, and of a model whose logits are none."""

from __future__ import annotations

import json
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from cllm_spheres.errors import InputError
from cllm_spheres.inference.model import load
from cllm_spheres.inference.writer import Piece, Scored
from cllm_spheres.text.tokenizer import ByteTokenizer, StreamDecoder
from cllm_spheres.web import inference
from cllm_spheres.web.inference import LEAST, Inference, Places, Service

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


@pytest.mark.parametrize("options", [{}, {"score_prompt": True, "logprobs": 2}, {"temperature": 1.0}], ids=str)
def test_logits_that_are_not_finite_refuse_what_is_being_written_and_nothing_after(service, alone, options):
    """Weights of which only the later positions are NaN: they load, and a short text is as good as ever."""
    service.model.parameters["wpe.weight"][30:] = np.nan
    service.begin(order(70))
    service.begin(order(71, "a" * 40, options=OPTIONS | options, names=True))
    told = [event for _ in range(3) for event in service.step()]
    message = "The model's logits are not finite: its weights are damaged or its training diverged."
    refused = [event for event in told if "refused" in event]
    assert refused == [{"id": id, "refused": message, "status": 500, "code": "not_finite"} for id in (70, 71)]
    assert service.texts == {} and service.writer.free == 2
    service.begin(order(72))
    told = [event for _ in range(5) for event in service.step()]
    assert "".join(event["text"] for event in told) == alone.text("ab", tokens=5, temperature=0)


def test_a_model_that_can_write_nothing_is_named_before_anything_is_served(run, monkeypatch):
    def damaged(*arguments):
        model = load(*arguments)
        model.parameters["ln_f.weight"][:] = np.nan
        return model

    monkeypatch.setattr(inference, "load", damaged)
    with pytest.raises(InputError, match=rf"{run} cannot be served\. .*not finite.*--checkpoint"):
        Service.of(str(run), None, 2, "fp32", None)


def test_an_infinite_log_probability_becomes_a_number_that_json_has(service, monkeypatch):
    service.begin(order(70, names=True, options=OPTIONS | {"logprobs": 1}))
    (number,) = service.texts
    scored = Scored(97, -float("inf"), ((98, 0.0), (256, -float("inf"))))
    monkeypatch.setattr(service.writer, "step", lambda: [Piece(number, "a", (scored,), None, None)])
    assert service.step()[0]["scored"] == [["a", LEAST, [["b", 0.0], [None, LEAST]], 0]]


@pytest.mark.parametrize("asked", [{"prompt": "a" * 40}, {"prompt": "a" * 70}, {
    "prompt": None, "messages": [{"role": "user", "text": "a" * 20}] * 9}])  # fmt: skip
def test_the_samples_of_a_request_encode_its_prompt_once(service, monkeypatch, asked):
    """A hundred samples of a prompt that takes a second to encode would hold everybody up for as many seconds."""
    encoded = []
    monkeypatch.setattr(service, "longest", 2)
    monkeypatch.setattr(service.model.tokenizer, "encode", lambda text: encoded.append(text) or list(text.encode()))
    answers, counts = [], []
    for sample in range(2):
        try:
            answers.append(service.begin(order(70 + sample, **asked, sample=sample))["begun"])
        except InputError as error:
            answers.append(str(error))
        counts.append(len(encoded))
    assert answers[0] == answers[1] and counts[0] == counts[1] > 0


def test_orders_are_taken_for_a_moment_only_and_each_is_answered_at_once(service, monkeypatch):
    told, now = [], [0.0]
    process = Inference(None)
    process.services = [service]
    monkeypatch.setattr(process, "say", told.append)
    monkeypatch.setattr(inference, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(service, "begin", lambda order: now.__setitem__(0, now[0] + 0.03) or {"id": order["begin"]})
    orders = deque(json.dumps({"begin": number, "model": 0}).encode() for number in range(5))
    process.obey_some(orders)
    assert told == [[{"id": 0}], [{"id": 1}]] and len(orders) == 3


def test_prompts_that_are_too_long_are_refused_before_they_are_encoded(service, monkeypatch):
    monkeypatch.setattr(service.model.tokenizer, "encode", lambda text: pytest.fail("it was encoded"))
    with pytest.raises(InputError, match="65 characters"):
        service.begin(order(70, "a" * 65))
    with pytest.raises(InputError, match="block has 64"):
        service.begin({**order(70), "messages": [{"role": "user", "text": "a" * 65}]})


A = 97
PLACES = {  # tokens of bytes -> their text, and the character with which each begins
    "a character of two bytes": ([A, 0xC3, 0xA4, A], "aäa", [0, 1, 1, 2]),
    "one that a letter breaks": ([A, 0xC3, A, A], "a\ufffdaa", [0, 1, 2, 3]),
    "one that another breaks": ([0xE2, 0x82, 0xC3, 0xA4], "\ufffdä", [0, 0, 1, 1]),
    "bytes that begin nothing": ([0xFF, 0xA4, A], "\ufffd\ufffda", [0, 1, 2]),
    "a real replacement character": ([0xEF, 0xBF, 0xBD, A], "\ufffda", [0, 0, 0, 1]),
    "one that never ends": ([A, 0xE2, 0x82], "a\ufffd", [0, 1, 1]),
}


@pytest.mark.parametrize("name", PLACES)
def test_tokens_begin_with_their_own_character(name):
    ids, text, expected = PLACES[name]
    tokenizer = ByteTokenizer()
    places = Places(StreamDecoder(tokenizer))
    assert tokenizer.decode(ids) == text
    assert [places.of(token) for token in ids] == expected and places.end() == len(text)


def test_what_is_written_after_an_open_character_is_placed_behind_it(service, monkeypatch):
    """A text that goes on from half a character, ends with half of one, and then with the end of text."""
    service.begin(order(70, [A, 0xC3], names=True, echo=True, options=OPTIONS | {"score_prompt": True, "logprobs": 0}))
    (number,) = service.texts
    prompt, new = (Scored(A), Scored(0xC3, -1.0)), [(0xA4, "\ufffd", None), (0xC3, "", None), (256, "\ufffd", "stop")]
    pieces = [Piece(number, text, (Scored(token, -1.0),), prompt if i == 0 else None, ended)
              for i, (token, text, ended) in enumerate(new)]  # fmt: skip
    monkeypatch.setattr(service.writer, "step", lambda: [pieces.pop(0)])
    told = [service.step()[0] for _ in new]
    places = [scored[3] for event in told for scored in [*event.get("scored_prompt", ()), *event["scored"]]]
    assert places == [0, 1, 2, 3, 4]  # of "a\ufffd" and "\ufffd\ufffd"
