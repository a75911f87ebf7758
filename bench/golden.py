"""transformers' own GPT-2 -> small model folders with their logits and token ids: what tests/golden holds.

Made by `make conformance`; only this needs torch and transformers. Each folder has random weights of a shape and a way
of saving of its own, and expected.npz: ids_T, logits_TV, and the ids of each text in texts.json.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cllm_spheres_bench.nasty_texts import nasty_texts

NUM_TEXTS = 60  # the known traps and some random ones
CORPUS = "The spheres turn around a node, and the node counts the steps of the spheres. 12 345 don't we'll\n" * 4


@dataclass(frozen=True)
class Case:
    """A model folder: the shape, and how it is saved."""

    config: dict[str, Any]
    dtype: str = "float32"
    save: dict[str, Any] = field(default_factory=dict)  # options of save_pretrained
    old: bool = False  # names without prefix, masks, lm_head; vocab.json and merges.txt
    eot_first: bool = False


_SMALL = dict(n_positions=16, n_embd=16, n_layer=2, n_head=2, vocab_size=280)
CASES = {
    "plain": Case(_SMALL),
    "sharded": Case(_SMALL | dict(n_layer=3, n_head=4, n_inner=40), save=dict(max_shard_size="20KB")),
    "half": Case(_SMALL | dict(n_embd=24, n_head=3, n_positions=20), dtype="float16"),
    "padded-bfloat": Case(_SMALL | dict(vocab_size=304, n_layer=1), dtype="bfloat16"),
    "old": Case(_SMALL | dict(n_head=1, activation_function="gelu_pytorch_tanh"), old=True),
    "eot-first": Case(_SMALL | dict(n_layer=1), eot_first=True),
}


def make_golden(folder: Path) -> None:
    """Every case, into folders of these names; what was there is replaced."""
    for name, case in CASES.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        _make(folder / name, case)


def _make(folder: Path, case: Case) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    tokenizer = _tokenizer(folder, case)
    config = GPT2Config(**case.config, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, and large enough that a wrong one shows in the logits
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(getattr(torch, case.dtype))
    model.save_pretrained(folder, **case.save)
    model = model.float()  # the arithmetic of the comparison; the weights are rounded already
    if case.old:
        _save_old(folder, model, tokenizer)
    rng = np.random.default_rng(3)
    ids_T = rng.integers(0, len(tokenizer), case.config["n_positions"])
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(ids_T)[None]).logits[0].numpy()
    np.savez_compressed(folder / "expected.npz", ids_T=ids_T, logits_TV=logits_TV.astype(np.float32))
    texts = nasty_texts(NUM_TEXTS)[:NUM_TEXTS]
    ids = [tokenizer(text, split_special_tokens=True).input_ids for text in texts]
    (folder / "texts.json").write_text(json.dumps([texts, ids]) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)


def _tokenizer(folder: Path, case: Case) -> Any:
    """A byte-level BPE of 280 tokens, saved by transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    eot = "<|endoftext|>"
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [eot] if case.eot_first else []
    size = 280 - (not case.eot_first)
    library.train_from_iterator(
        [CORPUS],
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    record = json.loads(library.to_str())["model"]
    vocab, merges = record["vocab"], [tuple(merge) for merge in record["merges"]]
    vocab.setdefault(eot, len(vocab))
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges, add_prefix_space=False)
    assert tokenizer.eos_token_id == (0 if case.eot_first else 279), tokenizer.eos_token_id
    tokenizer.save_pretrained(folder)
    if case.old:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


def _save_old(folder: Path, model: Any, tokenizer: Any) -> None:
    """As the first GPT-2 on the hub was saved."""
    import torch
    from safetensors.torch import save_file

    block = model.config.n_positions
    weights = {name.removeprefix("transformer."): tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in range(model.config.n_layer):
        weights[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, block, block, dtype=torch.uint8))
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
