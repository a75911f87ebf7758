"""The twins of the whole model and of the optimizer: what the fast code is measured with must be right."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from tests import naive
from tests.check import assert_gradient


def model(rng, bias):
    shape = Shape(vocab_size=11, block_size=7, layers=2, heads=3, width=12, ff_width=20, bias=bias)
    parameters = {tensor.name: 0.5 * rng.standard_normal(tensor.shape) for tensor in Layout(shape).tensors}
    inputs, targets = rng.integers(0, 11, (2, 3, 5))
    return shape, parameters, inputs, targets


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_gradient_of_the_model_is_a_finite_difference(bias, dropout, rng):
    shape, parameters, inputs, targets = model(rng, bias)
    kept = {}

    def mask(site, dims):
        return kept.setdefault(site, 1.5 * rng.integers(0, 2, dims)) if dropout else np.ones(dims)

    _, gradients = naive.naive_loss_and_gradients(shape, parameters, inputs, targets, mask)
    assert gradients.keys() == parameters.keys()
    for name, array in parameters.items():

        def loss(x, name=name):
            return naive.naive_loss_and_gradients(shape, parameters | {name: x}, inputs, targets, mask)[0]

        assert_gradient(loss, array, gradients[name], rng, name)


def test_the_loss_of_the_model_is_the_mean_cross_entropy_of_its_logits(rng):
    shape, parameters, inputs, targets = model(rng, True)
    logits = naive.naive_logits(shape, parameters, inputs)
    probabilities = naive.softmax(logits)[np.arange(3)[:, None], np.arange(5), targets]
    loss, _ = naive.naive_loss_and_gradients(shape, parameters, inputs, targets)
    assert abs(loss + np.log(probabilities).mean()) < 1e-13


def test_the_logits_do_not_see_the_future(rng):
    shape, parameters, inputs, _ = model(rng, True)
    other = inputs.copy()
    other[:, 3:] = (other[:, 3:] + 1) % 11
    before, after = (naive.naive_logits(shape, parameters, ids) for ids in (inputs, other))
    assert (before[:, :3] == after[:, :3]).all() and (before[:, 3:] != after[:, 3:]).all()


def test_the_first_step_of_adamw_has_the_length_of_the_learning_rate(rng):
    p, g = rng.standard_normal(9), rng.standard_normal(9)
    new, m, v = naive.adamw(p, g, 0 * p, 0 * p, 1, 0.01, 0.9, 0.99, decay=0.1)
    assert np.allclose(new, p - 0.01 * np.sign(g) - 0.001 * p, rtol=0, atol=1e-8)
    assert np.allclose(m, 0.1 * g) and np.allclose(v, 0.01 * g**2)


def test_sgd_and_clip_are_their_formulas(rng):
    p, g, m = rng.standard_normal((3, 9))
    new, momentum = naive.sgd(p, g, m, 0.1, 0.9)
    assert np.allclose(momentum, 0.9 * m + g) and np.allclose(new, p - 0.1 * momentum)
    clipped, norm = naive.clip(g, 0.5)
    assert np.isclose(norm, np.linalg.norm(g)) and np.isclose(np.linalg.norm(clipped), 0.5)
    assert (naive.clip(g, 100)[0] == g).all()
