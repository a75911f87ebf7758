"""What a token costs, counted by hand."""

from __future__ import annotations

from cllm_spheres.model.costs import flops_per_token
from cllm_spheres.model.shape import Shape


def test_the_operations_of_a_token_are_those_counted_by_hand():
    # One layer of width 4: qkv 4 x 12, projection 4 x 4, feed-forward 4 x 8 and 8 x 4; the head 10 x 4.
    products = 48 + 16 + 32 + 32 + 40
    # A query meets (1 + 2 + 3 + 4 + 5 + 6) / 6 keys on average, half of 6 by the usual count: 3 scores of 4 products
    # and 3 x 4 for the values, 2 operations each, forward and twice backward.
    attention = (3 * 4 + 3 * 4) * 2 * 3
    shape = Shape(vocab_size=10, block_size=6, layers=1, heads=2, width=4, ff_width=8)
    assert flops_per_token(shape) == 6 * products + attention
    assert flops_per_token(shape, training=False) == 2 * products + attention // 3


def test_more_layers_cost_as_much_each_and_biases_nothing():
    one, two, three = (flops_per_token(Shape(10, 6, layers, 2, 4, 8)) for layers in (1, 2, 3))
    assert three - two == two - one > 0
    assert flops_per_token(Shape(10, 6, 1, 2, 4, 8, bias=False)) == one
