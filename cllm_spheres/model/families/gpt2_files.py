"""GPT-2 in the files of other tools: its shape <-> config.json of Hugging Face's transformers, keys of GGUF."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cllm_spheres.errors import InputError, shown
from cllm_spheres.model.description import Files
from cllm_spheres.model.shape import Shape

EPSILON = 1e-5  # of the layer norms, as our kernels have it
GELUS = ("gelu_new", "gelu_pytorch_tanh")  # two names of the same formula, the one that our kernels compute
MAX_VOCAB = 2**31

# What changes the arithmetic: key -> what a config.json without it means, what our kernels compute.
_ARITHMETIC: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "activation_function": ("gelu_new", GELUS),
    "layer_norm_epsilon": (EPSILON, (EPSILON,)),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "add_cross_attention": (False, (False,)),
    "tie_word_embeddings": (True, (True,)),
}


def huggingface_config(shape: Shape, eot: int, dropout: float = 0.0) -> dict[str, Any]:
    """config.json of a GPT-2 with this shape. Other tools have biases always: that there are none is a word of ours."""
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": shape.vocab_size,
        "n_positions": shape.block_size, "n_ctx": shape.block_size, "n_embd": shape.width,
        "n_layer": shape.layers, "n_head": shape.heads, "n_inner": shape.ff_width,
        "activation_function": "gelu_new", "layer_norm_epsilon": EPSILON, "tie_word_embeddings": True,
        "bos_token_id": eot, "eos_token_id": eot, "torch_dtype": "float32",
        "resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout,
        **({} if shape.bias else {"bias": False}),
    }  # fmt: skip


def shape_of_config(config: dict[str, Any], where: str) -> Shape:
    """The shape that a config.json describes. InputError names what is not computed here."""
    for key, (default, known) in _ARITHMETIC.items():
        value = config.get(key, default)
        if value not in known or isinstance(value, bool) != isinstance(known[0], bool):
            raise InputError(
                f"{where} has {key} {shown(value)}: only {' or '.join(map(repr, known))} is computed here, so its"
                " logits would be others."
            )
    from cllm_spheres.config import MAX_LAYERS, MAX_TOKENS, MAX_WIDTH  # pydantic takes its time to import

    sizes = {}
    for key, default, most in (
        ("vocab_size", 50257, MAX_VOCAB), ("n_positions", 1024, MAX_TOKENS), ("n_embd", 768, MAX_WIDTH),
        ("n_layer", 12, MAX_LAYERS), ("n_head", 12, MAX_WIDTH),
    ):  # fmt: skip
        sizes[key] = _size(config.get(key, default), key, most, where)
    width, heads = sizes["n_embd"], sizes["n_head"]
    if width % heads:
        raise InputError(f"{where} has n_embd {width}, which n_head {heads} does not divide.")
    inner = config.get("n_inner")
    ff_width = 4 * width if inner is None else _size(inner, "n_inner", 4 * MAX_WIDTH, where)
    return Shape(sizes["vocab_size"], sizes["n_positions"], sizes["n_layer"], heads, width, ff_width)


def _size(value: object, key: str, most: int, where: str) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise InputError(f"{where} has {key} {shown(value)}: it must be a whole number from 1 to {most:,}.")
    return value


def gguf_keys(shape: Shape) -> dict[str, int | float]:
    """What a GGUF file says of the shape."""
    return {
        "context_length": shape.block_size, "embedding_length": shape.width, "block_count": shape.layers,
        "feed_forward_length": shape.ff_width, "attention.head_count": shape.heads,
        "attention.layer_norm_epsilon": EPSILON,
    }  # fmt: skip


FILES = Files(
    model_type="gpt2",
    prefix="transformer.",
    buffers=r"h\.\d+\.attn\.(bias|masked_bias)",  # masks
    config=huggingface_config,
    shape=shape_of_config,
    stored=lambda shape: replace(shape, bias=True),
    architecture="gpt2",
    gguf_keys=gguf_keys,
)
