"""Whatever happened to a checkpoint's bytes: it is refused with a reason, and an older one is used."""

import hashlib
import json
import os
import random
import re
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cllm_spheres.checkpoint.checkpoint import FILES, Checkpoint
from cllm_spheres.checkpoint.files import Damaged, read_manifest, seal
from cllm_spheres.errors import InputError
from tests.faults.amounts import WHOLE

ALL = (*FILES, "manifest.json")
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reseal(folder):
    """A manifest that agrees with the files, as one who means harm would write it."""
    files = {}
    for name in sorted(FILES):
        data = (folder / name).read_bytes()
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    step = json.loads((folder / "manifest.json").read_bytes())["step"]
    (folder / "manifest.json").write_bytes(seal({"format": 1, "step": step, "files": files}))


@pytest.fixture
def two(store, save):
    """A store with the good steps 1 and 2."""
    save(store, 1)
    save(store, 2)
    return store


def places(size, num_short):
    """All of a file's bytes in the whole form; else about `num_short`, the first and the last among them."""
    return range(size) if WHOLE else sorted({*range(0, size, max(1, size // num_short)), size - 1})


def assert_refused_and_the_older_one_used(store, name):
    with pytest.raises(Damaged, match=re.escape(name)) as refused:
        store.load(2)
    good, reasons = store.newest_good()
    assert good.step == 1 and reasons == [refused.value.what]
    return refused.value.reason


@pytest.mark.parametrize("name", ALL)
def test_every_truncation_is_refused_and_the_older_one_used(two, name):
    path = two.path(2) / name
    whole = path.read_bytes()
    for size in places(len(whole), 25):
        path.write_bytes(whole[:size])
        reason = assert_refused_and_the_older_one_used(two, name)
        assert "bytes" in reason or name == "manifest.json"
    path.write_bytes(whole)
    assert two.newest_good()[0].step == 2


@pytest.mark.parametrize("name", ALL)
def test_every_changed_byte_is_refused_and_the_older_one_used(two, name):
    path = two.path(2) / name
    whole = path.read_bytes()
    bits = random.Random(name)
    for place in places(len(whole), 200 if name == "manifest.json" else 40):
        changed = bytearray(whole)
        changed[place] ^= 1 << bits.randrange(8)
        path.write_bytes(changed)
        assert_refused_and_the_older_one_used(two, name)
    path.write_bytes(whole)
    assert two.newest_good()[0].step == 2


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("what", ["missing", "folder", "fifo", "loop"])
def test_a_file_that_is_no_file_is_refused_without_waiting(two, name, what):
    path = two.path(2) / name
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path.name)
    with pytest.raises(Damaged, match=name):
        two.load(2)
    assert two.newest_good()[0].step == 1


def test_a_checkpoint_under_another_name_is_refused(two):
    shutil.copytree(two.path(2), two.path(3))
    with pytest.raises(Damaged, match="step 2"):
        two.load(3)


def test_files_of_two_checkpoints_do_not_mix(two):
    shutil.copy(two.path(1) / "model.safetensors", two.path(2))
    with pytest.raises(Damaged, match=r"model\.safetensors has sha256"):
        two.load(2)


def test_without_a_good_checkpoint_every_reason_is_said(two):
    for step in (1, 2):
        (two.path(step) / "state.json").unlink()
    with pytest.raises(InputError) as error:
        two.newest_good()
    assert str(error.value).count("state.json is missing") == 2


def test_a_newer_format_says_which(two):
    content = read_manifest(two.path(2))
    (two.path(2) / "manifest.json").write_bytes(seal(content | {"format": 2}))
    with pytest.raises(Damaged, match="format 2, this version reads 1"):
        two.load(2)


@quick
@given(name=st.sampled_from(ALL), data=st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_in_words(two, name, data):
    path = two.path(2) / name
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        with pytest.raises(Damaged):
            Checkpoint(two.path(2))
    finally:
        path.write_bytes(whole)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
tensor_header = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "F8_E4M3", "U8", "X"]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, 2**32, 2**63, 2**64, -1]), max_size=4),
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 2**62, 2**64 - 1, -4]), min_size=2, max_size=2),
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), tensor_header | json_values, max_size=3)


@st.composite
def tensor_files(draw):
    text = json.dumps(draw(headers)).encode()
    length = draw(st.just(len(text)) | st.sampled_from([0, 1, len(text) + 1, 2**31, 2**63, 2**64 - 1]))
    return length.to_bytes(8, "little") + text + draw(st.binary(max_size=16))


@quick
@given(
    name=st.sampled_from(["model.safetensors", "optimizer.safetensors"]),
    data=tensor_files() | st.binary(max_size=100),
)
def test_a_malformed_header_under_a_true_manifest_is_refused_or_loads(two, name, data):
    read_sealed(two, name, data)


@quick
@given(
    name=st.sampled_from(["state.json", "config.json"]),
    data=st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()),
)
def test_malformed_json_under_a_true_manifest_is_refused_or_loads(two, name, data):
    read_sealed(two, name, data)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b'"\\ud800"', b"\xff\xfe{"])
def test_json_that_breaks_parsers_is_refused(two, text):
    with pytest.raises(Damaged):
        read_sealed(two, "state.json", text, give=True)
    (two.path(2) / "manifest.json").write_bytes(text[:60_000])
    with pytest.raises(Damaged):
        two.load(2)


@quick
@given(content=st.dictionaries(st.sampled_from(["format", "step", "files", "x"]), json_values | st.just(1)))
def test_a_manifest_of_any_content_is_refused_in_words(two, content):
    path = two.path(2) / "manifest.json"
    whole = path.read_bytes()
    try:
        try:
            path.write_bytes(seal({"format": 1, "step": 2} | content))
        except ValueError:  # NaN and the infinities are not JSON
            path.write_bytes(json.dumps(content | {"sha256": ""}).encode())
        with pytest.raises(Damaged):
            Checkpoint(two.path(2))
    finally:
        path.write_bytes(whole)


def read_sealed(store, name, data, give=False):
    """Reads step 2 with `data` as the file `name` and a manifest that agrees; raises Damaged if `give`."""
    saved = {each: (store.path(2) / each).read_bytes() for each in ALL}
    try:
        (store.path(2) / name).write_bytes(data)
        reseal(store.path(2))
        checkpoint = Checkpoint(store.path(2))
        assert sum(array.nbytes for array in checkpoint.model.values()) < 1000
        assert sum(array.nbytes for array in checkpoint.optimizer.values()) < 1000
        assert isinstance(checkpoint.state, dict) and isinstance(checkpoint.config, dict)
    except Damaged:
        if give:
            raise
    finally:
        for each, whole in saved.items():
            (store.path(2) / each).write_bytes(whole)
