"""Messages become a play's text that ends where the assistant speaks, and the oldest give way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres.errors import InputError
from cllm_spheres.inference.conversation import STOP, Lead, prompt_of, written
from cllm_spheres.text.dialogue import ROLES, Message

TALK = [Message("system", "Be brief."), Message("user", " Hello "), Message("assistant", "Hi."), Message("user", "Bye")]


def test_a_conversation_is_written_like_a_play():
    assert written(TALK) == "Be brief.\n\nUser: Hello\nAssistant: Hi.\nUser: Bye\nAssistant:"
    assert prompt_of(TALK, len, 1000).text == written(TALK)
    assert prompt_of(TALK, len, 1000).stop == STOP == ("\nUser:", "\nAssistant:")


def test_the_oldest_turns_give_way_and_the_system_message_stays():
    assert prompt_of(TALK, len, 56, reserve=0).left_out == 1
    short = prompt_of(TALK, len, 50)
    assert (short.text, short.left_out) == ("Be brief.\n\nUser: Bye\nAssistant:", 2)


def test_room_is_kept_for_the_answer_but_not_from_the_last_message():
    whole = len(written(TALK))
    assert prompt_of(TALK, len, whole, reserve=0).left_out == 0
    assert prompt_of(TALK, len, whole, reserve=1).left_out > 0
    last = len(written([TALK[3]]))
    assert prompt_of(TALK[1:], len, last, reserve=10).text == written([TALK[3]])


def test_what_cannot_fit_or_has_no_role_is_refused_with_the_numbers():
    with pytest.raises(InputError, match=r"system message take 31 tokens .* block has 30"):
        prompt_of(TALK, len, 30)
    with pytest.raises(InputError, match=r"no role 'usr': did you mean 'user'\?"):
        written([Message("usr", "x")])
    with pytest.raises(InputError, match="no message"):
        prompt_of([], len, 30)


@given(st.lists(st.builds(Message, st.sampled_from(ROLES), st.text(max_size=20)), min_size=1), st.integers(1, 200))
def test_a_prompt_never_outgrows_the_block_and_ends_with_the_assistant(messages, block_size):
    try:
        prompt = prompt_of(messages, len, block_size)
    except InputError as error:
        assert str(block_size) in str(error)
        return
    assert len(prompt.text) <= block_size and prompt.text.endswith("Assistant:")
    turns = [message for message in messages if message.role != "system"]
    assert 0 <= prompt.left_out < max(1, len(turns))


def test_many_turns_are_counted_a_few_times():
    counts = []

    def count(text):
        counts.append(text)
        return len(text)

    prompt = prompt_of([Message("user", str(i)) for i in range(1000)], count, 100)
    assert prompt.text.endswith("User: 999\nAssistant:") and len(prompt.text) <= 75 and len(counts) < 20
    assert len(written([Message("user", str(i)) for i in range(prompt.left_out - 1, 1000)])) > 75


@given(st.lists(st.text(" \nab")))
def test_the_lead_of_an_answer_is_cut_however_it_is_sliced(pieces):
    lead = Lead()
    assert "".join(map(lead.cut, pieces)) == "".join(pieces).lstrip()
