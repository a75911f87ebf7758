"""What a token costs, which sizes there are, and the text of S2."""

from __future__ import annotations

import pytest
from cllm_spheres_bench.sizes import SIZES, chosen_sizes, flops_per_token, write_characters

from cllm_spheres.errors import InputError
from cllm_spheres.model.shape import Shape


def test_the_operations_of_a_token_are_those_counted_by_hand():
    # One layer of width 4: qkv 4 x 12, projection 4 x 4, feed-forward 4 x 8 and 8 x 4; the head 10 x 4.
    products = 48 + 16 + 32 + 32 + 40
    # A query meets (1 + 2 + 3 + 4 + 5 + 6) / 6 keys on average, half of 6 by the usual count: 3 scores of 4 products
    # and 3 x 4 for the values, 2 operations each, forward and twice backward.
    attention = (3 * 4 + 3 * 4) * 2 * 3
    shape = Shape(vocab_size=10, block_size=6, layers=1, heads=2, width=4, ff_width=8)
    assert flops_per_token(shape) == 6 * products + attention


def test_more_layers_cost_as_much_each_and_biases_nothing():
    one, two, three = (flops_per_token(Shape(10, 6, layers, 2, 4, 8)) for layers in (1, 2, 3))
    assert three - two == two - one > 0
    assert flops_per_token(Shape(10, 6, 1, 2, 4, 8, bias=False)) == one


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
