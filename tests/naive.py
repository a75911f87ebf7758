"""Slow, obvious twins in float64: arrays in, arrays out, the formula and nothing else.

Every jitted kernel is compared with its twin here, and every twin's gradient with finite differences. The
whole model is at the end: `naive_logits`, `naive_hidden_states`, `naive_loss_and_gradients`. Gradients are returned,
not added.

B sequences, T positions, C channels, H heads of width D, V vocabulary, F feed-forward, M rows, I inputs,
O outputs. An argument without suffix may have any leading dimensions.
"""

from __future__ import annotations

import math

import numpy as np

from cllm_spheres.model.shape import Shape

EPSILON = 1e-5  # of layer normalisation, GPT-2's


def no_dropout(site, shape):
    """A mask that keeps all."""
    return np.ones(shape)


# --- the kernels ---


def embedding_forward(ids_BT, wte_VC, wpe_TC):
    return wte_VC[ids_BT] + wpe_TC[: ids_BT.shape[1]]


def embedding_backward(dout_BTC, ids_BT, num_tokens, num_positions):
    """dwte, dwpe."""
    dwte_VC = np.zeros((num_tokens, dout_BTC.shape[-1]))
    dwpe_TC = np.zeros((num_positions, dout_BTC.shape[-1]))
    np.add.at(dwte_VC, ids_BT, dout_BTC)
    dwpe_TC[: ids_BT.shape[1]] = dout_BTC.sum(0)
    return dwte_VC, dwpe_TC


def normed(x):
    """x with mean 0 and variance 1 in each row, and 1 / its standard deviation."""
    centred = x - x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    return centred * rstd, rstd


def layernorm_forward(x, gain_C, bias_C=0.0):
    return normed(x)[0] * gain_C + bias_C


def layernorm_backward(dout, x, gain_C):
    """dx, dgain, dbias."""
    n, rstd = normed(x)
    g = dout * gain_C
    dx = rstd * (g - g.mean(-1, keepdims=True) - n * (g * n).mean(-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    return dx, (dout * n).sum(rows), dout.sum(rows)


def linear_forward(x, w_IO, b_O=0.0):
    return x @ w_IO + b_O


def linear_backward(dout, x, w_IO):
    """dx, dw, db."""
    dout_MO, x_MI = dout.reshape(-1, w_IO.shape[1]), x.reshape(-1, w_IO.shape[0])
    return dout @ w_IO.T, x_MI.T @ dout_MO, dout_MO.sum(0)


def gelu_forward(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_backward(dout, x):
    """dx."""
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return dout * ((1 + t) / 2 + x / 2 * (1 - t**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def split_heads(x_BTC, heads):
    """[B, T, C] -> [B, H, T, D]."""
    b, t, c = x_BTC.shape
    return x_BTC.reshape(b, t, heads, c // heads).transpose(0, 2, 1, 3)


def join_heads(x_BHTD):
    """[B, H, T, D] -> [B, T, C]."""
    b, h, t, d = x_BHTD.shape
    return x_BHTD.transpose(0, 2, 1, 3).reshape(b, t, h * d)


def attention_scores(q_BHTD, k_BHTD):
    """q k^T / sqrt(D), and -inf where a query would look ahead."""
    t, d = q_BHTD.shape[-2:]
    scores_BHTT = q_BHTD @ k_BHTD.transpose(0, 1, 3, 2) / math.sqrt(d)
    return np.where(np.tril(np.ones((t, t), bool)), scores_BHTT, -np.inf)


def attention_forward(qkv_BT3C, heads, mask_BHTT=1.0):
    """mask: 0 where a probability is dropped, 1 / (1 - rate) where it is kept."""
    q, k, v = (split_heads(part, heads) for part in np.split(qkv_BT3C, 3, axis=-1))
    return join_heads(softmax(attention_scores(q, k)) * mask_BHTT @ v)


def attention_log_sum_exp(qkv_BT3C, heads):
    """[B, H, T]: the logarithm of the sum of the exponentials of each row of scores."""
    q, k, _ = (split_heads(part, heads) for part in np.split(qkv_BT3C, 3, axis=-1))
    scores = attention_scores(q, k)
    largest = scores.max(-1)
    return largest + np.log(np.exp(scores - largest[..., None]).sum(-1))


def attention_backward(dout_BTC, qkv_BT3C, heads, mask_BHTT=1.0):
    """dqkv."""
    q, k, v = (split_heads(part, heads) for part in np.split(qkv_BT3C, 3, axis=-1))
    dout = split_heads(dout_BTC, heads)
    p = softmax(attention_scores(q, k))
    dv = (p * mask_BHTT).transpose(0, 1, 3, 2) @ dout
    dp = dout @ v.transpose(0, 1, 3, 2) * mask_BHTT
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / math.sqrt(q.shape[-1])
    dq, dk = ds @ k, ds.transpose(0, 1, 3, 2) @ q
    return np.concatenate([join_heads(dq), join_heads(dk), join_heads(dv)], axis=-1)


def wanted(targets_M, num_tokens, alpha=0.0, q_VV=0.0):
    """What the softmax of each row is held against: its target, and alpha of it the target's row of q."""
    return ((1 - alpha) * np.eye(num_tokens) + alpha * q_VV)[targets_M]


def cross_entropy_forward(logits_MV, targets_M, *soft):
    """The sum of the token losses. soft: alpha and q_VV of `wanted`."""
    largest = logits_MV.max(-1)
    log_sum = largest + np.log(np.exp(logits_MV - largest[:, None]).sum(-1))
    return (log_sum - (wanted(targets_M, logits_MV.shape[1], *soft) * logits_MV).sum(-1)).sum()


def cross_entropy_backward(logits_MV, targets_M, *soft):
    """dlogits."""
    return softmax(logits_MV) - wanted(targets_M, logits_MV.shape[1], *soft)


def head_forward(x_MC, wte_VC, targets_M, *soft):
    """The sum of the token losses under the output that is tied to the token embedding."""
    return cross_entropy_forward(x_MC @ wte_VC.T, targets_M, *soft)


def head_backward(x_MC, wte_VC, targets_M, *soft):
    """dx, dwte."""
    dlogits_MV = cross_entropy_backward(x_MC @ wte_VC.T, targets_M, *soft)
    return dlogits_MV @ wte_VC, dlogits_MV.T @ x_MC


# --- the optimizer ---


def clip(gradient, max_norm):
    """The gradient, shortened where it is longer than max_norm; and its norm before."""
    norm = math.sqrt((gradient**2).sum())
    return (gradient * (max_norm / norm) if norm > max_norm else gradient), norm


def adamw(p, g, m, v, t, lr, beta1, beta2, epsilon=1e-8, decay=0.0):
    """p, m, v after step t, counted from 1. Source: Loshchilov and Hutter (2019)."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return p - lr * (m_hat / (np.sqrt(v_hat) + epsilon) + decay * p), m, v


def sgd(p, g, m, lr, momentum, decay=0.0):
    """p, m."""
    m = momentum * m + g
    return p - lr * (m + decay * p), m


# --- the model ---


def _forward(shape: Shape, parameters, inputs_BT, mask):
    """The final normed rows [B, T, C], and what the backward needs of each layer."""
    p = {name: array.astype(np.float64) for name, array in parameters.items()}
    b, t = inputs_BT.shape
    wide, square = (b, t, shape.width), (b, shape.heads, t, t)
    x = embedding_forward(inputs_BT, p["wte.weight"], p["wpe.weight"]) * mask(0, wide)
    layers = []
    for layer in range(shape.layers):
        w = {name.removeprefix(f"h.{layer}."): a for name, a in p.items() if name.startswith(f"h.{layer}.")}
        ln1 = layernorm_forward(x, w["ln_1.weight"], w.get("ln_1.bias", 0.0))
        qkv = linear_forward(ln1, w["attn.c_attn.weight"], w.get("attn.c_attn.bias", 0.0))
        att = attention_forward(qkv, shape.heads, mask(3 * layer + 1, square))
        projected = linear_forward(att, w["attn.c_proj.weight"], w.get("attn.c_proj.bias", 0.0))
        mid = x + projected * mask(3 * layer + 2, wide)
        ln2 = layernorm_forward(mid, w["ln_2.weight"], w.get("ln_2.bias", 0.0))
        up = linear_forward(ln2, w["mlp.c_fc.weight"], w.get("mlp.c_fc.bias", 0.0))
        act = gelu_forward(up)
        down = linear_forward(act, w["mlp.c_proj.weight"], w.get("mlp.c_proj.bias", 0.0))
        layers.append((w, x, ln1, qkv, att, mid, ln2, up, act))
        x = mid + down * mask(3 * layer + 3, wide)
    return p, layers, x, layernorm_forward(x, p["ln_f.weight"], p.get("ln_f.bias", 0.0))


def naive_logits(shape: Shape, parameters, inputs_BT, mask=no_dropout):
    """[B, T, V] of GPT-2. parameters: name -> array. mask: (site, shape) -> dropout mask.

    Sites: 0 the embedding; of layer l: 3l+1 the probabilities, 3l+2 attention's output, 3l+3 feed-forward's.
    """
    p, _, _, final_BTC = _forward(shape, parameters, inputs_BT, mask)
    return final_BTC @ p["wte.weight"].T


def naive_hidden_states(shape: Shape, parameters, inputs_BT):
    """[layers + 1, B, T, C]: what goes into each layer, and the normed rows behind the last."""
    _, layers, _, final_BTC = _forward(shape, parameters, inputs_BT, no_dropout)
    return np.stack([layer[1] for layer in layers] + [final_BTC])


def naive_loss_and_gradients(shape: Shape, parameters, inputs_BT, targets_BT, mask=no_dropout, soft=()):
    """The mean token loss, and name -> gradient for every parameter. soft: alpha and q_VV of `wanted`."""
    p, layers, x, final_BTC = _forward(shape, parameters, inputs_BT, mask)
    b, t = inputs_BT.shape
    wide, square = (b, t, shape.width), (b, shape.heads, t, t)
    final_MC, targets_M = final_BTC.reshape(b * t, -1), targets_BT.reshape(-1)
    loss = head_forward(final_MC, p["wte.weight"], targets_M, *soft) / (b * t)
    dfinal_MC, dwte_VC = head_backward(final_MC, p["wte.weight"], targets_M, *soft)
    gradients = {}
    dx, gradients["ln_f.weight"], gradients["ln_f.bias"] = layernorm_backward(
        dfinal_MC.reshape(wide) / (b * t), x, p["ln_f.weight"]
    )
    for layer in reversed(range(shape.layers)):
        w, x, ln1, qkv, att, mid, ln2, up, act = layers[layer]
        g = {}
        ddown = dx * mask(3 * layer + 3, wide)
        dact, g["mlp.c_proj.weight"], g["mlp.c_proj.bias"] = linear_backward(ddown, act, w["mlp.c_proj.weight"])
        dup = gelu_backward(dact, up)
        dln2, g["mlp.c_fc.weight"], g["mlp.c_fc.bias"] = linear_backward(dup, ln2, w["mlp.c_fc.weight"])
        dnorm, g["ln_2.weight"], g["ln_2.bias"] = layernorm_backward(dln2, mid, w["ln_2.weight"])
        dmid = dx + dnorm
        dproj = dmid * mask(3 * layer + 2, wide)
        datt, g["attn.c_proj.weight"], g["attn.c_proj.bias"] = linear_backward(dproj, att, w["attn.c_proj.weight"])
        dqkv = attention_backward(datt, qkv, shape.heads, mask(3 * layer + 1, square))
        dln1, g["attn.c_attn.weight"], g["attn.c_attn.bias"] = linear_backward(dqkv, ln1, w["attn.c_attn.weight"])
        dnorm, g["ln_1.weight"], g["ln_1.bias"] = layernorm_backward(dln1, x, w["ln_1.weight"])
        dx = dmid + dnorm
        gradients |= {f"h.{layer}.{name}": gradient for name, gradient in g.items()}
    dtokens_VC, gradients["wpe.weight"] = embedding_backward(
        dx * mask(0, wide), inputs_BT, shape.vocab_size, shape.block_size
    )
    gradients["wte.weight"] = dwte_VC / (b * t) + dtokens_VC
    return loss, {name: gradients[name] for name in parameters}
