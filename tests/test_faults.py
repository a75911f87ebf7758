"""PHASE:STEP:SPHERE:ACTION -> a fault, or a sentence that says what is wrong with it."""

from __future__ import annotations

import pytest

from cllm_spheres.errors import InputError
from cllm_spheres.faults import ACTIONS, HAVE_NUMBERS, MOST_FAULTS, PHASES, parse


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_parsed_is_spelled_as_it_was(phase, action):
    text = f"{phase}:7:3:{action}"
    if action == "nan" and phase not in HAVE_NUMBERS:
        with pytest.raises(InputError, match=f"no number arises in {phase}"):
            parse([text], 4, 10)
    else:
        (fault,) = parse([f" {text.upper()} "], 4, 10)
        assert str(fault) == text and fault.words == (PHASES.index(phase), 7, 3, 1 + ACTIONS.index(action))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forward:7:3", "is not PHASE:STEP:SPHERE:ACTION, such as forward:100:3:kill"),
        ("forward:-7:3:kill", "is not PHASE:STEP:SPHERE:ACTION"),
        ("", "is not PHASE"),
        ("forwards:7:3:kill", "there is no phase 'forwards': did you mean 'forward'"),
        ("forward:7:3:kil", "there is no action 'kil': did you mean 'kill'"),
        ("forward:7:4:kill", "there is no sphere 4: the run has 0 to 3"),
        ("forward:11:3:kill", "step 11 is not among those of this run, 1 to 10"),
        ("forward:0:3:kill", "step 0 is not among those"),
    ],
)
def test_what_cannot_be_is_refused_in_words(text, message):
    with pytest.raises(InputError, match=message):
        parse([text], 4, 10)


def test_too_many_are_refused():
    with pytest.raises(InputError, match=f"{MOST_FAULTS + 1} faults were given, a run has at most {MOST_FAULTS}"):
        parse(["forward:7:3:kill"] * (MOST_FAULTS + 1), 4, 10)
