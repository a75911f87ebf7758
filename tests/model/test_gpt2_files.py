"""config.json of a GPT-2 and our shape: there and back, and what is refused."""

from __future__ import annotations

import pytest

from cllm_spheres.errors import InputError
from cllm_spheres.model.families.gpt2_files import huggingface_config, shape_of_config
from cllm_spheres.model.shape import Shape

SHAPE = Shape(vocab_size=300, block_size=16, layers=2, heads=4, width=32, ff_width=100)
CONFIG = huggingface_config(SHAPE, 299)


def test_a_shape_comes_back():
    assert shape_of_config(CONFIG, "config.json") == SHAPE


def test_what_a_config_does_not_say_is_what_gpt2_is():
    shape = Shape(vocab_size=50257, block_size=1024, layers=12, heads=12, width=768, ff_width=3072)
    assert shape_of_config({"model_type": "gpt2"}, "config.json") == shape


@pytest.mark.parametrize("inner", [{}, {"n_inner": None}])
def test_the_feed_forward_width_is_four_widths_unless_given(inner):
    config = {key: value for key, value in CONFIG.items() if key != "n_inner"}
    assert shape_of_config(config | inner, "config.json").ff_width == 128


REFUSED = {
    "activation_function": ["gelu", "relu", ["gelu_new"]],
    "layer_norm_epsilon": [1e-6, "1e-5"], "scale_attn_weights": [False, 1],
    "scale_attn_by_inverse_layer_idx": [True, 0], "add_cross_attention": [True], "tie_word_embeddings": [False],
    "vocab_size": [0, -1, 2**40, 1.5, "300", True], "n_positions": [0, 2**30], "n_layer": [0, 10**9], "n_head": [0, 3],
    "n_embd": [0, 10**9], "n_inner": [0, 10**12, "x"],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_what_would_compute_something_else_is_refused_by_name(key, value):
    with pytest.raises(InputError) as caught:
        shape_of_config(CONFIG | {key: value}, "config.json")
    assert "config.json" in str(caught.value) and key in str(caught.value)


def test_gelu_has_two_names():
    assert shape_of_config(CONFIG | {"activation_function": "gelu_pytorch_tanh"}, "config.json") == SHAPE
