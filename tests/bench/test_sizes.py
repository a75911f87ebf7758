"""Which sizes there are, and the text of S2."""

from __future__ import annotations

import pytest
from cllm_spheres_bench.sizes import SIZES, chosen_sizes, write_characters

from cllm_spheres.errors import InputError
from cllm_spheres.model.shape import Shape


def test_the_sizes_are_those_of_the_presets():
    assert {name: size.shape.vocab_size for name, size in SIZES.items()} == {
        "S1": 381, "S2": 65, "S3": 4096, "S4": 8192, "S5": 50304,
    }  # fmt: skip
    assert SIZES["S3"].tokens == 16 * 128
    assert SIZES["S5"].shape == Shape(50304, 256, 12, 12, 768, 3072)


def test_sizes_are_chosen_by_name_and_an_unknown_one_is_named():
    assert [size.name for size in chosen_sizes("s3, S1,S3")] == ["S3", "S1"]
    with pytest.raises(InputError, match=r"'S9'.*did you mean 'S"):
        chosen_sizes("S9")
    with pytest.raises(InputError, match="names none"):
        chosen_sizes(",")


def test_the_text_of_characters_has_exactly_as_many_as_were_asked_for(tmp_path):
    path = tmp_path / "characters.txt"
    write_characters(path, 20)
    text = path.read_text()
    assert len(set(text)) == 20 and " " in text and len(text) > 1e6
    assert list(tmp_path.iterdir()) == [path]
