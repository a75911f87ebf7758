"""PHASE:STEP:SPHERE:ACTION -> a fault that a run brings upon itself, once, to show that it survives.

The phases are those of a step, and `save`; a fault in `gather`, `update` or `barrier` happens to the worker that
hosts the sphere, one in `save` to Node Zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cllm_spheres.errors import InputError, nearest

PHASES = ("forward", "backward", "barrier", "gather", "update", "save")
FORWARD, BACKWARD, BARRIER, GATHER, UPDATE, SAVE = range(len(PHASES))
ACTIONS = ("kill", "stop", "segv", "nan", "slow")
KILL, STOP, SEGV, NAN, SLOW = range(1, 1 + len(ACTIONS))  # 0: nothing
HAVE_NUMBERS = ("forward", "backward", "gather", "update")  # phases in which a NaN can arise
SLOW_S = 3  # longer than most steps, shorter than what counts as hung
MOST_FAULTS = 64  # of a run

_FORM = re.compile(r"([a-z]+):([0-9]{1,18}):([0-9]{1,18}):([a-z]+)")


@dataclass(frozen=True)
class Fault:
    """One fault: `phase` and `action` by name, `step` from 1, `sphere` from 0."""

    phase: str
    step: int
    sphere: int
    action: str

    def __str__(self) -> str:
        return f"{self.phase}:{self.step}:{self.sphere}:{self.action}"

    @property
    def words(self) -> tuple[int, int, int, int]:
        """As numbers, for the workers."""
        return PHASES.index(self.phase), self.step, self.sphere, 1 + ACTIONS.index(self.action)


def parse(texts: list[str], spheres: int, last: int) -> list[Fault]:
    """The faults of a run of the steps 1 .. last. InputError names what is wrong with one."""
    faults = []
    for text in texts:
        match = _FORM.fullmatch(text.strip().lower())
        if not match:
            raise InputError(f"--fault {text!r} is not PHASE:STEP:SPHERE:ACTION, such as forward:100:3:kill.")
        phase, step, sphere, action = match[1], int(match[2]), int(match[3]), match[4]
        if phase not in PHASES:
            raise InputError(f"--fault {text}: there is no phase {phase!r}: {nearest(phase, PHASES)}")
        if action not in ACTIONS:
            raise InputError(f"--fault {text}: there is no action {action!r}: {nearest(action, ACTIONS)}")
        if sphere >= spheres:
            raise InputError(f"--fault {text}: there is no sphere {sphere}: the run has 0 to {spheres - 1}.")
        if not 1 <= step <= last:
            raise InputError(f"--fault {text}: step {step} is not among those of this run, 1 to {last}.")
        if action == "nan" and phase not in HAVE_NUMBERS:
            raise InputError(f"--fault {text}: no number arises in {phase}; nan is for {', '.join(HAVE_NUMBERS)}.")
        faults.append(Fault(phase, step, sphere, action))
    if len(faults) > MOST_FAULTS:
        raise InputError(f"{len(faults)} faults were given, a run has at most {MOST_FAULTS}.")
    return faults
