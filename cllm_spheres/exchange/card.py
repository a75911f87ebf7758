"""A checkpoint and its run -> README.md of an exported model: what it is, how to use it, how it was trained.

Folders of this machine are not named in it, only the last part of a name.
"""

from __future__ import annotations

import contextlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cllm_spheres.checkpoint.checkpoint import Checkpoint
from cllm_spheres.config import read_toml
from cllm_spheres.errors import InputError
from cllm_spheres.events import read
from cllm_spheres.exchange.source import Source
from cllm_spheres.exchange.tokenizer_out import end_of_text
from cllm_spheres.model.families import family_of
from cllm_spheres.model.layout import Layout
from cllm_spheres.text.folder import MANIFEST_BYTES, is_prepared, read_regular

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- {tag}
- cllm-spheres
---

# {name}

A {title} of {parameters:,} parameters, trained with cllm-spheres {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
print(tokenizer.decode(model.generate(do_sample=True, max_new_tokens={tokens})[0]))
```

Without a prompt the text begins with `{eot}`, which in training stands between documents. A prompt's ids are
`tokenizer(text, return_tensors="pt")`, for `model.generate(**ids, ...)`; what it spells is text, special tokens too.
Prompt and continuation together can have {block:,} tokens.
{biases}
## The model

{model}

## How it was trained

{training}
"""


def model_card(source: Source, name: str, dtype: str) -> str:
    """The text of README.md."""
    shape, tokenizer = source.shape, source.tokenizer
    model = {
        "layers": shape.layers, "heads": shape.heads, "width": shape.width, "feed-forward width": shape.ff_width,
        "context in tokens": shape.block_size, "vocabulary": shape.vocab_size, "tokenizer": tokenizer.kind,
        "weights stored as": dtype,
    }  # fmt: skip
    biases = "" if shape.bias else "It was trained without biases: those stored here are zeros.\n"
    family = family_of(shape)
    return _CARD.format(
        tag=family.files.model_type, title=family.title, name=_plain(name), version=_version(),
        parameters=Layout(shape).num_parameters, eot=end_of_text(tokenizer),
        tokens=max(1, min(100, shape.block_size - 1)), block=shape.block_size, biases=biases, model=_table(model),
        training=_table(_training(source.checkpoint)),
    )  # fmt: skip


def _training(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What the run's folder says of how the checkpoint came about; what it does not say is left out."""
    if checkpoint is None:
        return {"weights": "as they were imported"}
    run, state = checkpoint.path.parent.parent, checkpoint.state
    facts: dict[str, Any] = {}
    config: dict[str, Any] = {}
    if (run / "config.toml").is_file():
        with contextlib.suppress(InputError):
            config = read_toml(run / "config.toml")
    if origin := config.get("from") or state.get("imported"):
        facts["began from"] = Path(str(origin)).name
    facts |= _data(config)
    facts["step of this checkpoint"] = f"{checkpoint.step:,} of {config.get('steps', checkpoint.step):,}"
    facts["training tokens seen"] = state.get("total_tokens")
    facts |= _losses(run, checkpoint.step)
    keys = ("batch_size", "block_size", "init", "loss", "alpha", "optimizer", "lr", "min_lr", "warmup", "schedule",
            "beta1", "beta2", "weight_decay", "clip", "dropout", "seed", "spheres")  # fmt: skip
    facts |= {key.replace("_", " "): config[key] for key in keys if key in config}
    numerics = state.get("fingerprint")
    if isinstance(numerics, dict):
        facts["arithmetic"] = (
            f"{numerics.get('dtype')}, {numerics.get('backend')}, version {numerics.get('arithmetic')}"
        )
        facts |= {name: numerics.get(name) for name in ("numba", "llvmlite", "blas")}
    return facts


def _data(config: dict[str, Any]) -> dict[str, Any]:
    if not config.get("data"):
        return {}
    name = "the source text of Python's standard library" if config.get("text") == "" else None
    facts = {"data": name or Path(str(config.get("text") or config["data"])).name}
    folder = Path(str(config["data"]))
    if is_prepared(folder):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads(read_regular(folder / "manifest.json", MANIFEST_BYTES))
            facts["documents, bytes, tokens"] = " / ".join(f"{manifest[k]:,}" for k in ("documents", "bytes", "tokens"))
    return facts | {"fingerprint of the data": str(config.get("data_fingerprint"))[:16]}


def _losses(run: Path, step: int) -> dict[str, Any]:
    """The losses that metrics.jsonl has of this step."""
    facts: dict[str, Any] = {}
    if (run / "metrics.jsonl").is_file():
        for record in read(run / "metrics.jsonl"):
            if record.get("step") != step:
                continue
            if record["kind"] == "step":
                facts["training loss (nats a token)"] = _number(record.get("cross_entropy", record.get("loss")))
            elif record["kind"] == "eval":
                facts["validation loss (nats a token)"] = _number(record.get("val_loss"))
                if record.get("bits_per_byte") is not None:
                    facts["validation bits per byte"] = _number(record["bits_per_byte"])
    return facts


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(facts: dict[str, Any]) -> str:
    rows = [f"| {key} | {_plain(str(_grouped(value)))} |" for key, value in facts.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows])


def _grouped(value: object) -> object:
    return f"{value:,}" if type(value) is int else value


def _version() -> str:
    try:
        return version("cllm-spheres")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0"


def _plain(text: str) -> str:
    """On one line, and nothing in it that a table or a heading would take for its own."""
    return "".join(c if c.isprintable() and c not in "|`<>[]\\" else " " for c in text)
