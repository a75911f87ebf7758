"""A running run that is renamed or removed: it goes on in its own folder, or ends in words, and harms no other."""

from __future__ import annotations

import os
import shutil
import signal

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.events import read
from cllm_spheres.inference.model import load
from cllm_spheres.training.control import ask
from tests.runs import WAIT_S, Outcome, begin, start, wait_until

OPTIONS = dict(steps=5000, save_every=200, eval_every=2500, eval_tokens=200, keep=2, workers=1)


def test_a_run_that_is_renamed_goes_on_and_one_that_is_removed_ends_in_words_and_both_leave_their_successors_alone(
    corpus, tmp_path
):
    place, renamed = tmp_path / "run", tmp_path / "renamed"
    first = start(corpus, place, **OPTIONS)
    wait_until(lambda: Store(place).steps(), "a checkpoint")
    with begin("watch", place, "--plain") as watching:
        assert watching.stdout.readline()  # it has found the run
        os.kill(first.process.pid, signal.SIGSTOP)  # most of its checkpoints are saved while its successor is there
        place.rename(renamed)
        second = start(corpus, place, **OPTIONS | {"steps": 10**6, "seed": 2})
        os.kill(first.process.pid, signal.SIGCONT)
        assert ask(renamed, {"workers": 2}).startswith("2 workers from step")  # found by its new name
        assert first.finish() == (0, f"Ended at step 5,000. The run is in {renamed}") and first.run == renamed
        assert f"Ended at step 5,000: {renamed}" in watching.communicate(timeout=WAIT_S)[0]  # it followed it there
    assert load(renamed).generate("a", tokens=1)
    outcome = Outcome(renamed, 0, "")
    assert outcome.config.workers == 2 and Store(renamed).steps()[-2:] == [4800, 5000]
    assert outcome.event("end")["path"] == str(Store(renamed).path(5000))
    assert "/proc/" not in (renamed / "metrics.jsonl").read_text()

    wait_until(lambda: Store(place).steps(), "a checkpoint of the second")
    assert Store(place).newest_good()[0].state["seed"] == 2
    while place.exists():  # a checkpoint may appear while its folder is emptied
        shutil.rmtree(place, ignore_errors=True)
    third = start(corpus, place, **OPTIONS)
    code, message = second.finish()
    assert code == 1 and f"The run was removed while it went on: {place} has no config.toml any more" in message
    assert "Traceback" not in message and "--resume" not in message
    assert third.finish() == (0, f"Ended at step 5,000. The run is in {place}")
    again = Outcome(place, 0, "")
    assert [record["event"] for record in again.of("event")][:1] == ["start"]
    assert again.bits == outcome.bits
    assert read(place / "metrics.jsonl")[-1]["path"] == str(Store(place).path(5000))
