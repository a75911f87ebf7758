"""A run as a Hugging Face folder: every weight, the dtypes, the card; written whole, in no other's place."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from cllm_spheres.checkpoint.disk import Disk
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import InputError
from cllm_spheres.exchange.export import export
from cllm_spheres.exchange.huggingface import NAMES
from cllm_spheres.exchange.narrow import narrow
from cllm_spheres.exchange.safetensors_file import read_header
from cllm_spheres.exchange.source import open_source
from tests.exchange.models import contents, make_run, tokenizers
from tests.runs import corpus, train_whole  # noqa: F401


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / "run", tokenizers()["bpe"])
    return tmp_path / "run"


def test_every_weight_is_there_in_float32_bit_by_bit(tmp_path):
    model = make_run(tmp_path / "run", tokenizers()["char"])
    done = export(tmp_path / "run", "hf", tmp_path / "hf")
    found = load_file(tmp_path / "hf/model.safetensors")
    assert found.keys() == {f"transformer.{name}" for name in model}
    assert all(np.array_equal(found[f"transformer.{name}"], values) for name, values in model.items())
    assert set(done.files) == set(NAMES) == set(os.listdir(tmp_path / "hf"))
    assert done.files == {name: len(data) for name, data in contents(tmp_path / "hf").items()}


def test_a_model_without_biases_gets_zeros(tmp_path):
    model = make_run(tmp_path / "run", tokenizers()["byte"], bias=False)
    export(tmp_path / "run", "hf", tmp_path / "hf")
    found = load_file(tmp_path / "hf/model.safetensors")
    added = found.keys() - {f"transformer.{name}" for name in model}
    assert len(added) == 2 * 6 + 1 and all(name.endswith("bias") and not found[name].any() for name in added)
    assert "trained without biases" in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize(("dtype", "spelled", "torch"), [("f16", "F16", "float16"), ("bf16", "BF16", "bfloat16")])
def test_narrow_weights_are_the_nearest_ones(run, tmp_path, dtype, spelled, torch):
    export(run, "hf", tmp_path / "hf", dtype=dtype)
    entries = read_header(tmp_path / "hf/model.safetensors")
    assert {entry.dtype for entry in entries.values()} == {spelled}
    for name, values in open_source(run).tensors():
        read = entries[f"transformer.{name}"].read()
        # half an ulp: 2**-11 with 10 bits of mantissa, 2**-8 with 7; below 2**-14 f16 is spaced by 2**-24
        np.testing.assert_allclose(read, values, rtol=2**-11 if dtype == "f16" else 2**-8, atol=2**-25)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == torch and "bias" not in config


def test_rounding_to_bfloat16_is_to_nearest_ties_to_even():
    one = np.float32(1)
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8), 0.0, -0.0], np.float32)
    bits = narrow("w", values, "bf16").astype(np.uint32) << 16
    assert bits.view(np.float32).tolist() == [one, 1 + 2**-6, 1 + 2**-7, -one, 0.0, -0.0]


@pytest.mark.parametrize(("dtype", "large", "said"), [("f16", 70000.0, "65504"), ("bf16", 3.4e38, "3.38953e+38")])
def test_a_weight_that_overflows_is_named(tmp_path, dtype, large, said):
    make_run(tmp_path / "run", tokenizers()["byte"])
    checkpoint = Store(tmp_path / "run").load()
    model = checkpoint.model
    model["h.1.mlp.c_fc.weight"][3, 4] = -large
    Store(tmp_path / "run").save(
        4, model, checkpoint.optimizer, checkpoint.state | {"step": 4}, checkpoint.config, checkpoint.tokenizer_path
    )
    for to, name in (("hf", "hf"), ("gguf", "x.gguf")):
        with pytest.raises(InputError) as caught:
            export(tmp_path / "run", to, tmp_path / name, dtype=dtype)
        assert "h.1.mlp.c_fc.weight" in str(caught.value) and said in str(caught.value) and "f32" in str(caught.value)
        assert not (tmp_path / name).exists()
        export(tmp_path / "run", to, tmp_path / name)
    export(tmp_path / "run", "hf", tmp_path / "hf", dtype=dtype, which=3, force=True)  # an earlier one fits


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    make_run(tmp_path / "run", tokenizers()["byte"])
    checkpoint = Store(tmp_path / "run").load()
    model = checkpoint.model
    model["ln_f.bias"][0] = np.inf
    Store(tmp_path / "run").save(
        4, model, checkpoint.optimizer, checkpoint.state | {"step": 4}, checkpoint.config, checkpoint.tokenizer_path
    )
    with pytest.raises(InputError, match=r"ln_f.bias .* NaN or infinity"):
        export(tmp_path / "run", "hf", tmp_path / "hf")


def test_the_card_says_how_the_model_was_trained(corpus, tmp_path):  # noqa: F811
    run = train_whole(corpus, tmp_path / "trained", steps=6, eval_every=3, seed=77)
    export(run.run, "hf", tmp_path / "hf", which="last")
    card = (tmp_path / "hf/README.md").read_text()
    loss = run.evaluations[-1][1]
    for words in (
        "# hf", "| data | prepared |", "| step of this checkpoint | 6 of 6 |", f"nats a token) | {loss:.4f} |",
        "| seed | 77 |", "| training tokens seen | 192 |", "| lr | 0.01 |", "| tokenizer | byte |",
        "library_name: transformers",
    ):  # fmt: skip
        assert words in card
    assert str(tmp_path) not in card and "/" + corpus.parts[1] + "/" not in card


def test_a_name_cannot_break_the_card(run, tmp_path):
    export(run, "hf", tmp_path / "a|b`c\n# x")
    assert "# a b c # x\n" in (tmp_path / "a|b`c\n# x/README.md").read_text()


# ---- where it goes


def test_an_export_is_replaced_only_with_force_and_other_files_never(run, tmp_path):
    target = tmp_path / "models/hf"
    export(run, "hf", target)
    first = contents(target)
    with pytest.raises(InputError, match=r"holds a model already.*--force"):
        export(run, "hf", target, dtype="f16")
    assert contents(target) == first
    export(run, "hf", target, dtype="f16", force=True)
    second = contents(target)
    assert second != first and second.keys() == first.keys()
    (target / "thesis.tex").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match=r"'thesis.tex', which no export has written"):
            export(run, "hf", target, force=force)
    assert contents(target) == second | {"thesis.tex": b"mine"}
    assert os.listdir(target.parent) == ["hf"]


def test_an_empty_folder_is_taken_and_a_file_is_not(run, tmp_path):
    (tmp_path / "hf").mkdir()
    export(run, "hf", tmp_path / "hf")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"):
        export(run, "hf", tmp_path / "file", force=True)
    with pytest.raises(InputError, match="cannot be written"):
        export(run, "hf", tmp_path / "file/hf")


def test_whatever_the_disk_refuses_leaves_the_old_export_whole_and_nothing_else(run, tmp_path, monkeypatch):
    target = tmp_path / "models/hf"
    export(run, "hf", target)
    before = contents(target)
    count = {"left": 0}

    def before_operation(operation, *paths):
        count["left"] -= 1
        if count["left"] == 0:
            raise OSError(28, os.strerror(28))

    real = Disk.__init__
    monkeypatch.setattr(Disk, "__init__", lambda self, before=None: real(self, before or before_operation))
    num_failed = 0
    for number in range(1, 100):
        count["left"] = number
        try:
            export(run, "hf", target, dtype="bf16", force=True)
        except InputError as error:
            assert "No space left" in str(error)
            num_failed += 1
            assert set(os.listdir(target)) == set(NAMES)
            if contents(target) != before:
                break  # it had been placed already; only a sync failed after it
            assert os.listdir(target.parent) == ["hf"]
        else:
            break
    assert num_failed > 20


def test_unknown_targets_and_dtypes_name_the_nearest(run, tmp_path):
    with pytest.raises(InputError, match=r"no export target 'ggf': did you mean 'gguf'"):
        export(run, "ggf", tmp_path / "x")
    with pytest.raises(InputError, match=r"--dtype cannot be 'fp16'.*did you mean 'f16'"):
        export(run, "hf", tmp_path / "x", dtype="fp16")


def test_a_run_without_a_checkpoint_has_nothing_to_export(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text("")
    with pytest.raises(InputError, match="has no checkpoints yet"):
        export(tmp_path / "run", "hf", tmp_path / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a run"):
        export(tmp_path / "empty", "hf", tmp_path / "x")


def test_a_checkpoint_can_be_chosen(run, tmp_path):
    with pytest.raises(InputError, match="no checkpoint of step 7: the nearest is 3"):
        export(run, "hf", tmp_path / "x", which="7")
    export(run, "hf", tmp_path / "x", which="last")
    export(run / "checkpoints/step-00000003", "hf", tmp_path / "y")
    names = [name for name in NAMES if name != "README.md"]  # which has the folder's name
    one, other = contents(tmp_path / "x"), contents(tmp_path / "y")
    assert all(one[name] == other[name] for name in names)
