"""The official client of OpenAI, blocking and streaming, as the documents show it."""

from __future__ import annotations

import openai
import pytest


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_and_completions(client, alone):
    assert [model.id for model in client.models.list()] == ["run"]
    assert client.models.retrieve("run").owned_by == "cllm-spheres"
    answer = client.completions.create(model="run", prompt="the ", max_tokens=20, seed=1, n=2, logprobs=1)
    assert [choice.text for choice in answer.choices] == [alone.text("the ", sample, tokens=20) for sample in (0, 1)]
    assert answer.usage.prompt_tokens == 4 and len(answer.choices[0].logprobs.tokens) == 20
    extra = client.completions.create(model="run", prompt="a", max_tokens=9, seed=1, extra_body={"top_k": 2})
    assert extra.choices[0].text == alone.text("a", tokens=9, top_k=2)


def test_completions_stream(client, alone):
    stream = client.completions.create(
        model="run", prompt="the ", max_tokens=20, seed=1, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == alone.text("the ", tokens=20)
    assert chunks[-1].usage.completion_tokens == 20


def test_chat_blocks_and_streams(client):
    talk = dict(model="run", messages=[{"role": "user", "content": "Hello"}], max_completion_tokens=20, seed=3)
    whole = client.chat.completions.create(**talk)
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason in ("stop", "length")
    pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**talk, stream=True)]
    assert "".join(pieces) == whole.choices[0].message.content


def test_errors_become_the_clients_own(client):
    with pytest.raises(openai.BadRequestError, match="temperature") as error:
        client.completions.create(model="run", prompt="a", temperature=9)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="did you mean 'run'"):
        client.completions.create(model="ruin", prompt="a")


def test_closing_a_stream_frees_the_slot(client, served):
    from tests.runs import wait_until

    stream = client.completions.create(model="run", prompt="ab", max_tokens=1_000_000, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(served.idle, "idle")


async def _ask_many(url, count):
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        asked = [client.completions.create(model="run", prompt="and", max_tokens=15, seed=s) for s in range(count)]
        return [answer.choices[0].text for answer in await asyncio.gather(*asked)]


def test_the_client_asks_for_many_at_once(served, alone):
    import asyncio

    assert asyncio.run(_ask_many(served.url, 10)) == [alone.text("and", tokens=15, seed=s) for s in range(10)]
