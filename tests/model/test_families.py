"""The family that docs/models.md adds: what it computes is compared with a twin written by hand, in numpy's float64."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from cllm_spheres.checkpoint.saved_model import open_run
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.doctor import twins
from cllm_spheres.exchange.export import export
from cllm_spheres.exchange.importing import import_model
from cllm_spheres.exchange.source import open_source
from cllm_spheres.model.description import Description
from cllm_spheres.model.dtypes import DTYPES, usable
from cllm_spheres.model.families import FAMILIES, family_of
from cllm_spheres.model.initialise import initial_tables
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.program import RECOMPUTE, program
from cllm_spheres.model.shape import Shape
from cllm_spheres.model.workspace import Workspace
from cllm_spheres.text.tokenizer import ByteTokenizer
from tests.runs import command_here

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/models.md"
USABLE = [dtype for dtype in DTYPES if usable(dtype) == dtype]
SHAPE = Shape(vocab_size=257, block_size=12, layers=2, heads=2, width=32, ff_width=40, family="plain")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """The code of the document has run."""
    monkeypatch.setattr("cllm_spheres.model.families.FAMILIES", FAMILIES)
    (code,) = [block for block in re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
               if "FAMILIES[" in block]  # fmt: skip
    exec(compile(code, str(DOCUMENT), "exec"), {})
    yield
    del FAMILIES["plain"]


def naive_logits(s, p, ids_BT):
    """The document's family, written out once more."""

    def norm(x, gain):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gain

    t = ids_BT.shape[1]
    x = p["tokens"][ids_BT] + p["positions"][:t]
    for layer in range(s.layers):
        w = {name.removeprefix(f"h.{layer}."): value for name, value in p.items() if name.startswith(f"h.{layer}.")}
        x = x + norm(x, w["first.weight"]) @ w["up.weight"] @ w["down.weight"]
        qkv = norm(x, w["second.weight"]) @ w["qkv.weight"] + w.get("qkv.bias", 0)
        heads = []
        for h in range(s.heads):
            d = s.width // s.heads
            q, k, v = (qkv[..., part * s.width + h * d : part * s.width + (h + 1) * d] for part in range(3))
            scores = np.where(np.tri(t, dtype=bool), q @ k.swapaxes(1, 2) / math.sqrt(d), -np.inf)
            e = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(e / e.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(heads, -1) @ w["out.weight"]
    return norm(x, p["last.weight"]) @ p["head"].T


def naive_loss(s, p, ids_BT, targets_BT):
    logits = naive_logits(s, p, ids_BT)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = e / e.sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(probabilities, targets_BT[..., None], -1)).sum()


def model(shape, seed=1):
    """A layout with weights that all matter, and tokens of 3 sequences."""
    layout, rng = Layout(shape), np.random.default_rng(seed)
    params_P = np.zeros(layout.size, np.float32)
    for placed, view in zip(layout.tensors, layout.views(params_P).values(), strict=True):
        view[...] = 0.2 * rng.standard_normal(view.shape) + placed.tensor.constant
    ids = rng.integers(0, shape.vocab_size, (2, 3, shape.block_size)).astype(np.int32)
    return layout, params_P, *ids


def gradient(layout, params_P, dtype, inputs, targets, **options):
    segment_P = np.full(layout.size, np.nan, np.float32)
    workspace = Workspace(layout, params_P, dtype, **options)
    workspace.arena[:] = np.nan
    workspace.pack()
    return workspace.shard(inputs, targets, segment_P, 1 / inputs.size)[0], segment_P


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", USABLE)
def test_loss_and_gradients_are_those_of_the_twin(dtype, bias):
    layout, params_P, inputs, targets = model(replace(SHAPE, bias=bias))
    exact = {name: view.astype(np.float64) for name, view in layout.views(params_P).items()}
    found, segment_P = gradient(layout, params_P, dtype, inputs, targets)
    expected = naive_loss(layout.shape, exact, inputs, targets)
    # bfloat16 keeps 0.4 % of each operand; the bounds are the doctor's, who measured them
    assert abs(found / expected - 1) < twins.LOSS_WITHIN[dtype]
    rng, gradients = np.random.default_rng(2), layout.views(segment_P)
    largest = max(float(np.linalg.norm(view)) for view in gradients.values())
    for name, view in gradients.items():
        assert np.isfinite(view).all(), name
        direction = rng.choice([-1.0, 1.0], view.shape) / math.sqrt(view.size)
        ends = [naive_loss(layout.shape, exact | {name: exact[name] + sign * 1e-4 * direction}, inputs, targets)
                for sign in (1, -1)]  # fmt: skip
        wanted = (ends[0] - ends[1]) / 2e-4 / inputs.size
        scale = max(float(np.linalg.norm(view)), 1e-2 * largest) / math.sqrt(view.size)
        assert abs(float((view * direction).sum()) - wanted) < twins.GRADIENT_WITHIN[dtype] * scale, name
    assert twins.loss(layout.shape, exact, inputs, targets) == pytest.approx(expected, rel=1e-12)


def of_order(order):
    """The describe of a family whose block has its steps in an order that no dtype, or not every one, computes."""

    def describe(s, d):
        x = d.embed("tokens", "positions", s.width, site=0)
        with d.block(0) as h:
            normed = x if order == "linear of the residual" else d.norm(x, f"{h}first")
            activation = "gelu" if order.startswith("activation") else ""
            up = d.linear(normed, f"{h}up", s.width, label="feed-forward up", activation=activation)
            up = d.norm(up, f"{h}second") if order.endswith("norm") else up
            added = up if order == "activation as residual" else x
            x = d.linear(normed if added is up else up, f"{h}down", s.width, residual=added, site=1, label="qkv")
        d.head(x if order == "head of the residual" else d.norm(x, "last"), "head")

    return describe


@pytest.mark.parametrize(
    ("order", "dtypes"),
    [
        ("activation as residual", DTYPES),
        ("activation into a norm", DTYPES),
        ("product into a norm", ["bf16"]),
        ("linear of the residual", ["bf16"]),
        ("head of the residual", ["bf16"]),
    ],
)
def test_an_order_that_would_be_computed_wrongly_is_refused(monkeypatch, order, dtypes):
    plain, shape, description = FAMILIES["plain"], replace(SHAPE, layers=1, ff_width=SHAPE.width), Description()
    of_order(order)(shape, description)
    used = [tensor for tensor in plain.tensors(shape) if any(tensor.name in step.tensors for step in description.steps)]
    monkeypatch.setitem(FAMILIES, "plain", replace(plain, describe=of_order(order), tensors=lambda _: used))
    layout = Layout(shape)
    for dtype in dtypes:
        with pytest.raises(AssertionError):
            program(layout, dtype, largest_shard=1)


@pytest.mark.parametrize("dtype", USABLE)
def test_the_doctor_checks_it(dtype):
    state, found = twins.look_at_model(dtype, "plain")
    assert state == "ok", found


@pytest.mark.parametrize("dtype", USABLE)
def test_it_learns_with_dropout_and_computing_again_changes_no_bits(dtype):
    layout, params_P, inputs, targets = model(SHAPE)
    losses = []
    for step in range(1, 9):
        options = dict(dropout=0.1)
        found = [gradient(layout, params_P, dtype, inputs, targets, recompute=mode, **options) for mode in RECOMPUTE]
        assert all(segment.tobytes() == found[0][1].tobytes() for _, segment in found), step
        assert len({loss for loss, _ in found}) == 1
        params_P -= np.float32(0.5) * np.nan_to_num(found[0][1])
        losses.append(found[0][0])
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]


def test_its_first_weights_are_what_it_says():
    places, values = initial_tables(Layout(SHAPE))
    found = {placed.name: tuple(pair) for placed, pair in zip(Layout(SHAPE).tensors, values, strict=True)}
    assert found["h.1.up.weight"] == (0.02, 0.0) and found["last.weight"] == (0.0, 1.0)
    assert found["h.0.qkv.bias"] == (0.0, 0.0) and len(places) == 4 + 2 * 7


@pytest.fixture
def run(tmp_path):
    """A run of the family with a checkpoint; its folder and weights."""
    layout, params_P, *_ = model(SHAPE)
    weights, tokenizer, path = layout.views(params_P), ByteTokenizer(), tmp_path / "run"
    path.mkdir()
    tokenizer.save(path / "tokenizer.json")
    state = {"step": 3, "layout": asdict(SHAPE), "total_tokens": 9}
    config = family_of(SHAPE).files.config(SHAPE, tokenizer.eot, 0.0)
    Store(path).save(3, weights, {"moments": np.zeros(1, np.float32)}, state, config, path / "tokenizer.json")
    return path, weights


def test_its_checkpoints_and_files_go_out_and_come_back(run, tmp_path):
    path, weights = run
    assert open_run(path)[1] == SHAPE
    export(path, "hf", tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "again")
    source = open_source(tmp_path / "again")
    again = dict(source.tensors())
    assert source.shape == SHAPE and again.keys() == weights.keys()
    assert all(np.array_equal(again[name], weights[name]) for name in weights)
    assert (tmp_path / "hf/README.md").read_text().count("A Plain of ") == 1
    export(path, "gguf", tmp_path / "x.gguf", dtype="f16")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert len(found) == len(weights)  # the output matrix is not written twice
    for name, values in (("output.weight", weights["head"]), ("blk.1.ffn_up.weight", weights["h.1.up.weight"].T),
                         ("token_embd.weight", weights["tokens"])):  # fmt: skip
        assert found[name].tensor_type.name == "F16"
        np.testing.assert_allclose(found[name].data.reshape(values.shape), values, rtol=2**-11, atol=2**-25)
    assert found["position_embd.weight"].tensor_type.name == "F32"


def test_its_program_is_shown_and_train_refuses_what_a_configuration_cannot_name(run, tmp_path):
    shown = command_here("model", "run", "--dtype", "fp32", cwd=tmp_path)
    assert shown.returncode == 0 and shown.stdout.startswith(f"run: a Plain of {Layout(SHAPE).num_parameters:,} ")
    rows = [line.split()[:2] for line in shown.stdout.splitlines() if line.startswith("  ")]
    assert [row[0] for row in rows][:8] == [
        "embed_forward", "norm_forward", "linear_forward", "linear_forward", "norm_forward", "linear_forward",
        "attention_forward", "linear_forward",
    ]  # fmt: skip
    (tmp_path / "text.txt").write_text("The spheres turn. " * 50)
    refused = command_here("train", "text.txt", "--from", "run", cwd=tmp_path)
    assert refused.returncode == 2 and "is a Plain, and train makes a GPT-2" in refused.stderr


def test_it_writes_the_text_of_its_logits(run):
    from cllm_spheres.inference.model import load

    path, weights = run
    written = load(path)
    exact = {name: values.astype(np.float64) for name, values in weights.items()}
    ids = list(b"Spheres")
    np.testing.assert_allclose(
        written.logits(ids), naive_logits(SHAPE, exact, np.array([ids]))[0], rtol=1e-4, atol=1e-4
    )  # float32 sums of 32 to 40 terms, where logits are around 3
    for _ in range(5):
        ids.append(int(naive_logits(SHAPE, exact, np.array([ids]))[0, -1].argmax()))
    assert written.generate("Spheres", tokens=5, temperature=0) == written.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.norm(d.steps[0].out, "nothing"), "layer norm reads nothing.weight, and there is no such tensor"),
        (lambda d: d.linear(d.steps[1].out, "h.0.up", 48, label="qkv"), r"as \(32, 48\), and it is \(32, 40\)"),
        (lambda d: d.steps.append(replace(d.steps[0])), "a site of dropout is used twice"),
        (lambda d: d.steps.pop(), "the last step must be the head"),
        (lambda d: d.steps.__delitem__(1), "no step reads h.0.first.weight"),
    ],
)
def test_steps_that_do_not_fit_the_tensors_are_refused(monkeypatch, change, message):
    def describe(shape, description):
        plain.describe(shape, description)
        change(description)

    plain = FAMILIES["plain"]
    monkeypatch.setitem(FAMILIES, "plain", replace(plain, describe=describe))
    with pytest.raises(ValueError, match=message):
        program(Layout(SHAPE), "fp32", largest_shard=1)
