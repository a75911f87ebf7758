"""What /v1/completions and /v1/chat/completions write is what a Writer alone writes, in OpenAI's form."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cllm_spheres.inference.conversation import STOP, written
from cllm_spheres.text.dialogue import Message
from tests.web.served import events


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


def test_a_text_is_the_one_that_a_writer_alone_writes(served, alone):
    answer = served.complete("the ", max_tokens=30)
    assert texts(answer) == [alone.text("the ", tokens=30)]
    assert answer["object"] == "text_completion" and answer["choices"][0]["finish_reason"] in ("length", "stop")
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["total_tokens"] == 4 + answer["usage"]["completion_tokens"] <= 34


OPTIONS = ({"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.9}, {"repetition_penalty": 1.5})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_does_what_it_does_for_a_writer(served, alone, options):
    expected = alone.text("the ", tokens=40, **options)
    assert texts(served.complete("the ", max_tokens=40, **options)) == [expected]
    assert expected != alone.text("the ", tokens=40)


def test_a_text_ends_before_the_first_stop_string(served, alone):
    whole = alone.text("the ", tokens=40, temperature=0)
    stop = [whole[5:8], whole[3:6], "never"]
    expected = whole[: min(whole.find(part) for part in stop[:2])]
    answer = served.complete("the ", max_tokens=40, temperature=0, stop=stop)
    assert texts(answer) == [expected] and answer["choices"][0]["finish_reason"] == "stop"
    assert texts(served.complete("the ", max_tokens=40, temperature=0, stop=stop[1])) == [whole[: whole.find(stop[1])]]


def test_prompts_in_every_form_and_samples_come_in_order(served, alone):
    ids = [list(b"ab"), list(b"xyz")]
    expected = [alone.text(p, sample, tokens=9) for p in ids for sample in range(3)]
    as_ids, as_texts = served.complete(ids, n=3, max_tokens=9), served.complete(["ab", "xyz"], n=3, max_tokens=9)
    assert texts(as_ids) == texts(as_texts) == expected
    assert as_ids["usage"]["prompt_tokens"] == 5
    assert [choice["index"] for choice in as_ids["choices"]] == [0, 1, 2, 3, 4, 5]
    assert texts(served.complete(ids[0], max_tokens=9)) == expected[:1]
    assert texts(served.complete("", max_tokens=9)) == [alone.text("", tokens=9)]


def test_texts_beside_each_other_are_those_that_are_written_alone(served, alone):
    def one(seed):
        return texts(served.complete("and so", seed=seed, max_tokens=5 + 3 * seed))[0]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == [alone.text("and so", seed=s, tokens=5 + 3 * s) for s in range(8)]


def test_a_stream_is_the_same_text_in_pieces(served, alone):
    body = {"model": "run", "prompt": ["ab", "cd"], "n": 2, "max_tokens": 25, "seed": 1, "stream": True}
    response = served.post("/v1/completions", **body, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    joined = [
        "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index) for index in range(4)
    ]
    assert joined == [alone.text(p, sample, tokens=25) for p in ("ab", "cd") for sample in (0, 1)]
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
    assert sum(reason is not None for reason in reasons) == 4
    assert last["choices"] == [] and last["usage"]["prompt_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["usage"] == served.complete(["ab", "cd"], n=2, max_tokens=25)["usage"]
    plain = events(served.post("/v1/completions", **body).text)
    assert all("usage" not in chunk for chunk in plain)


def test_no_seed_writes_another_text_each_time_and_seed_zero_the_same(served):
    assert len({texts(served.complete(seed=None, max_tokens=20))[0] for _ in range(3)}) == 3
    assert len({texts(served.complete(seed=0, max_tokens=20))[0] for _ in range(3)}) == 1


# --- log-probabilities


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def test_echo_scores_a_prompt_of_ids_as_an_evaluation_harness_wants_it(served, alone):
    context, continuation = list(b"one of the"), list(b" many")
    ids = context + continuation
    answer = served.complete([ids], max_tokens=1, temperature=0, logprobs=1, echo=True)
    found = answer["choices"][0]["logprobs"]
    assert {len(values) for values in found.values()} == {len(ids) + 1}
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    expected = log_softmax(alone.model.logits(ids))
    of_prompt = [expected[i, token] for i, token in enumerate(ids[1:])]
    # float32 sums in another order: the two ways to the logits agree to 1e-5
    np.testing.assert_allclose(found["token_logprobs"][1:-1], of_prompt, atol=1e-4)
    # what lm-evaluation-harness computes from it: the continuation's sum, and whether it is the greedy one
    start = len(context)
    assert np.isclose(sum(found["token_logprobs"][start:-1]), sum(of_prompt[start - 1 :]), atol=1e-4)
    for i, top in enumerate(found["top_logprobs"][1:], 1):
        assert np.isclose(max(top.values()), expected[i - 1].max(), atol=1e-4)
    assert "".join(found["tokens"][:-1]) == "one of the many"
    assert found["text_offset"][:-1] == list(range(len(ids)))
    assert answer["choices"][0]["text"].startswith("one of the many")
    alone_scored = served.complete([ids], max_tokens=0, temperature=0, logprobs=1, echo=True)
    assert alone_scored["choices"][0]["logprobs"]["token_logprobs"] == found["token_logprobs"][:-1]
    assert alone_scored["usage"]["completion_tokens"] == 0


def test_an_end_of_text_has_its_score_so_that_the_last_entry_is_never_one_of_the_prompt(served, alone):
    """A harness leaves the last entry out; where the text ends at once, it must not lose a token of the prompt."""
    eot, ids = alone.model.tokenizer.eot, list(b"abc")
    for seed in range(4000):
        if not alone.text(ids, tokens=1, seed=seed):
            break
    else:
        pytest.fail("no seed ends the text at once")
    answer = served.complete([ids], max_tokens=1, seed=seed, logprobs=1, echo=True)
    found = answer["choices"][0]
    assert found["finish_reason"] == "stop" and found["text"] == "abc"
    assert len(found["logprobs"]["tokens"]) == 4 and found["logprobs"]["tokens"][-1] == "<|endoftext|>"
    expected = log_softmax(alone.model.logits(ids))[-1, eot]
    assert np.isclose(found["logprobs"]["token_logprobs"][-1], expected, atol=1e-4)
    assert answer["usage"]["completion_tokens"] == 0


def test_logprobs_without_echo_are_of_the_new_tokens(served):
    answer = served.complete("the ", max_tokens=12, logprobs=3)
    found = answer["choices"][0]["logprobs"]
    assert len(found["tokens"]) == answer["usage"]["completion_tokens"] == 12
    for name, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[name] == logprob <= max(top.values()) <= 0 and 3 <= len(top) <= 4
    assert found["text_offset"] == sorted(found["text_offset"]) and found["text_offset"][0] == 0
    body = {"model": "run", "prompt": "the ", "seed": 1, "max_tokens": 12, "logprobs": 3, "stream": True}
    chunks = events(served.post("/v1/completions", **body).text)
    pieces = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    assert [value for piece in pieces for value in piece["token_logprobs"]] == found["token_logprobs"]
    assert [value for piece in pieces for value in piece["text_offset"]] == found["text_offset"]


def test_bytes_that_are_no_whole_character_are_named(served):
    found = served.complete([[195, 164]], max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert found["text"] == "ä" and found["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa4"]


# --- chat


TALK = [{"role": "developer", "content": "Hi."}, {"role": "user", "content": [{"type": "text", "text": "Ho?"}]}]


def chat_text(alone, tokens, **options):
    prompt = written([Message("system", "Hi."), Message("user", "Ho?")])
    return alone.text(prompt, tokens=tokens, stop=STOP, **options).lstrip()


def test_a_chat_goes_on_from_the_documented_template(served, alone):
    answer = served.post("/v1/chat/completions", model="run", messages=TALK, max_completion_tokens=30, seed=1).json()
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": chat_text(alone, 30), "refusal": None}
    assert answer["object"] == "chat.completion" and answer["usage"]["completion_tokens"] == 30
    assert answer["usage"]["prompt_tokens"] == len("Hi.\n\nUser: Ho?\nAssistant:")


def test_a_chat_streams_role_content_and_reason(served, alone):
    body = {"model": "run", "messages": TALK, "max_tokens": 30, "seed": 1, "n": 2, "stream": True}
    chunks = events(served.post("/v1/chat/completions", **body).text)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    for index in range(2):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        content = "".join(choice["delta"].get("content", "") for choice in choices)
        assert content == chat_text(alone, 30, sample=index) and choices[-1]["finish_reason"] == "length"


def test_chat_logprobs_name_tokens_and_bytes(served):
    answer = served.post(
        "/v1/chat/completions", model="run", messages=TALK, max_tokens=5, logprobs=True, top_logprobs=2, seed=1
    ).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    for entry in content:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 and len(entry["bytes"]) == 1


def test_the_oldest_messages_of_a_chat_give_way_to_the_block(served):
    old = [{"role": "user", "content": "x" * 30}, {"role": "assistant", "content": "y" * 30}]
    answer = served.post("/v1/chat/completions", model="run", messages=[*old, *TALK], max_tokens=5, seed=1).json()
    assert answer["usage"]["prompt_tokens"] == len("Hi.\n\nUser: Ho?\nAssistant:")
    response = served.post("/v1/chat/completions", model="run", messages=[{"role": "user", "content": "x" * 64}])
    assert response.status_code == 400 and "block has 64" in response.json()["error"]["message"]
