"""A conversation: its prompts, its answers, and what is forgotten."""

from __future__ import annotations

import pytest

from cllm_spheres.errors import InputError
from cllm_spheres.inference.chat import Chat
from cllm_spheres.inference.conversation import written
from cllm_spheres.inference.options import Options
from cllm_spheres.text.dialogue import ASSISTANT, USER, Message
from tests.inference.conftest import LETTERS, random_model

OPTIONS = Options(tokens=8, seed=3)


@pytest.fixture(scope="module")
def model():
    return random_model(block_size=120, letters=LETTERS + ":\n.?")


@pytest.fixture
def talk(model):
    with model.writer() as writer:
        yield Chat(model, writer, OPTIONS)


def said(pieces):
    return "".join(pieces)


def alone(model, turns, sample=0):
    """What the library writes after the same play."""
    (text,) = [one for one in model.generate_all(
        [written(turns)], samples=sample + 1, tokens=8, seed=3, stop=("\nUser:", "\nAssistant:")
    ) if one.sample == sample]  # fmt: skip
    return text.text.strip()


def test_an_answer_goes_on_with_the_play(model, talk):
    first = said(talk.say("Who is there?"))
    assert first.strip() == alone(model, [Message(USER, "Who is there?")]) and first
    second = said(talk.say("And who else?"))
    turns = [Message(USER, "Who is there?"), Message(ASSISTANT, first.strip()), Message(USER, "And who else?")]
    assert second.strip() == alone(model, turns)
    assert [turn.role for turn in talk.turns] == [USER, ASSISTANT] * 2 and talk.left_out == 0


def test_again_answers_differently_and_undo_forgets(model, talk):
    first = said(talk.say("Who?"))
    again = said(talk.again())
    assert again != first and again.strip() == alone(model, [Message(USER, "Who?")], sample=1)
    assert len(talk.turns) == 2 and talk.turns[1].text == again.strip()
    talk.undo()
    assert talk.turns == [] and said(talk.say("Who?")) == first
    talk.forget()
    with pytest.raises(InputError, match="nothing to answer yet"):
        talk.again()


def test_old_turns_are_left_out_when_the_block_is_full(talk):
    talk.system = "A talk."
    for number in range(1, 9):
        said(talk.say("Question." * number))
    assert talk.left_out > 0 and len(talk.turns) == 16


def test_what_does_not_fit_changes_nothing(talk):
    said(talk.say("Who?"))
    before = list(talk.turns)
    with pytest.raises(InputError, match=r"The last message take.* the model's block has 120"):
        talk.say("x" * 150)
    assert talk.turns == before and said(talk.say("Who?"))


def test_an_answer_that_is_cut_short_counts_as_far_as_it_came(talk):
    pieces = talk.say("Who?")
    first = next(pieces)
    pieces.close()
    assert talk.turns[-1].text == first.rstrip() and said(talk.say("And?"))  # the slot is free again
