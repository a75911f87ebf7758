"""Whatever a model folder holds: it is imported, or one paragraph says why not, and nothing is left.

With CLLM_FAULTS=whole in the environment some thousand random ones are tried.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres.errors import InputError
from cllm_spheres.exchange.importing import import_model
from cllm_spheres.inference.model import load
from tests.exchange.models import GOLDEN
from tests.faults.malformed import broken_bytes, many, mutated, put, time_limit, to_text

MOST_CHARACTERS = 1500  # of a message
TEXTS = json.loads((GOLDEN / "plain/texts.json").read_text())[0]


def tried(case: str, change) -> None:
    """Import a changed copy of a golden folder; what is taken can be used."""
    with tempfile.TemporaryDirectory() as place, time_limit():
        folder, run = Path(place) / "model", Path(place) / "run"
        shutil.copytree(GOLDEN / case, folder)
        change(folder)
        try:
            import_model(folder, run)
        except InputError as error:
            assert len(str(error)) < MOST_CHARACTERS
            assert not run.exists()
        else:
            model = load(run)
            assert np.isfinite(model.logits([0, model.shape.vocab_size - 1][: model.shape.block_size])).all()
            for text in TEXTS:
                ids = model.tokenizer.encode(text)
                assert model.tokenizer.eot not in ids and model.tokenizer.decode(ids) == text


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
@many(400, 25)
@given(data=st.data())
def test_json_files(name, data):
    good = json.loads((GOLDEN / "sharded" / name).read_text())
    value = data.draw(mutated(good))
    tried("sharded", lambda folder: (folder / name).write_text(to_text(value)))


@many(300, 25)
@given(data=st.data())
def test_vocab_and_merges(data):
    name = data.draw(st.sampled_from(["vocab.json", "merges.txt"]))
    content = data.draw(broken_bytes((GOLDEN / "old" / name).read_bytes()))
    tried("old", lambda folder: (folder / name).write_bytes(content))


@many(300, 25)
@given(data=st.data())
def test_bytes_of_weights(data):
    content = data.draw(broken_bytes((GOLDEN / "plain/model.safetensors").read_bytes()))
    tried("plain", lambda folder: (folder / "model.safetensors").write_bytes(content))


@many(300, 25)
@given(data=st.data())
def test_headers_of_weights(data):
    header, rest = header_of(GOLDEN / "plain/model.safetensors")
    text = to_text(data.draw(mutated(header))).encode()
    content = len(text).to_bytes(8, "little") + text + rest
    tried("plain", lambda folder: (folder / "model.safetensors").write_bytes(content))


@pytest.mark.parametrize("what", ["folder", "link to itself", "link to nothing", "link to a folder", "fifo", "empty"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_other_things_in_the_place_of_a_file(name, what):
    tried("plain", lambda folder: put(folder / name, what))
