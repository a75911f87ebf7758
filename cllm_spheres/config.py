"""Options from defaults, preset, file and command line -> one validated `Config`.

A later source wins: defaults < preset < `--config FILE.toml` < command line. `None` means "decided when the run
is planned", from the preset, the data and the machine (training/plan.py); config.toml of a run holds the result.
The text of a field is its help on the command line.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cllm_spheres.errors import InputError, nearest, shown

MAX_SPHERES = 156  # 12 + 144 places around Node Zero
MAX_STEPS = 10**9
MAX_NEIGHBOURS = 4096  # each costs time in every row of the head
MAX_WEIGHT = 1e6
MAX_LAYERS, MAX_WIDTH, MAX_TOKENS = 1000, 2**16, 2**20  # far above what trains on a CPU; sizes of them fit 64 bits
OFF_AT_0 = ("clip", "early_stop")  # in a file and on the command line, where there is no None
MOST_LINES = 8  # of one message
MAX_TOML_BYTES = 1 << 20  # a real one has about 5,000
# Of a run's own config.toml: what it was trained on, and the model that it began from.
ORIGIN_KEYS = ("text", "from", "from_fingerprint")
DATA_KEYS = ("data", "data_fingerprint", *ORIGIN_KEYS)


# Of each loss the options that it has besides.
_NEIGHBOURS = ("alpha", "neighbours", "neighbour_temperature", "gcd_weight", "ulam_weight")
LOSSES: dict[str, tuple[str, ...]] = {
    "cross-entropy": (), "smoothing": ("alpha",), "crystalline": _NEIGHBOURS, "random": _NEIGHBOURS,
}  # fmt: skip


class Config(BaseModel):
    """Everything that describes a run. Counts are in the unit their help names."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)

    preset: str | None = Field(None, description="A named size: minimal, tiny, small, medium, large, gpt2.")

    workers: int | None = Field(
        None,
        ge=1,
        le=MAX_SPHERES,
        description="Worker processes. Default: the physical cores this process may use.",
    )
    spheres: int | None = Field(
        None,
        ge=1,
        le=MAX_SPHERES,
        description="Logical workers; each owns a shard of every batch. The bits depend on this, not on "
        "--workers. Default: the preset's.",
    )
    steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="Optimizer steps; the horizon of the schedule.")
    epochs: float | None = Field(None, gt=0, description="Passes over the training text, instead of --steps.")
    batch_size: int | None = Field(None, ge=1, le=MAX_TOKENS, description="Sequences in a batch.")
    block_size: int = Field(64, ge=1, le=MAX_TOKENS, description="Tokens in a sequence: the context length.")

    layers: int = Field(4, ge=1, le=MAX_LAYERS, description="Transformer blocks.")
    heads: int = Field(4, ge=1, le=MAX_WIDTH, description="Attention heads; they divide the width.")
    width: int = Field(128, ge=1, le=MAX_WIDTH, description="Channels of the residual stream.")
    ff_width: int | None = Field(
        None, ge=1, le=4 * MAX_WIDTH, description="Channels of the feed-forward layer. Default: 4 x width."
    )
    bias: bool = Field(True, description="Biases in linear layers and layer norms, as GPT-2 has them.")

    tokenizer: Literal["byte", "char", "word", "bpe"] = Field(
        "bpe",
        description="How raw text becomes tokens: byte, char, word or bpe.",
    )
    vocab_size: int | None = Field(
        None, ge=1, le=2**31, description="Vocabulary for bpe and word. Default: the preset's."
    )

    init: Literal["gpt2", "lattice"] = Field(
        "gpt2",
        description="The first token embeddings: normal random numbers as GPT-2 has them, or the lattice features of "
        "each token's rank by frequency, of the same size.",
    )
    loss: Literal["cross-entropy", "crystalline", "smoothing", "random"] = Field(
        "cross-entropy",
        description="cross-entropy; or a share --alpha of each target goes to other tokens: crystalline, to those "
        "whose numbers by frequency are similar; smoothing, to all alike; random, to neighbours drawn by lot.",
    )
    alpha: float | None = Field(
        None, ge=0, le=1, description="The share of a target that goes to other tokens. Default: 0.1."
    )
    neighbours: int | None = Field(
        None, ge=1, le=MAX_NEIGHBOURS, description="Of a token, for crystalline and random. Default: 16."
    )
    neighbour_temperature: float | None = Field(
        None, gt=0, description="Of the softmax over a token's similarities: the lower, the more goes to the most "
        "similar. Default: 0.1.",
    )  # fmt: skip
    gcd_weight: float | None = Field(
        None, ge=0, le=MAX_WEIGHT, description="Of gcd(a, b) / max(a, b) in similarity. Default: 0.7."
    )
    ulam_weight: float | None = Field(
        None, ge=0, le=MAX_WEIGHT, description="Of 1 / (1 + distance on Ulam's spiral) in similarity. Default: 0.3."
    )

    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw, or sgd with momentum (--beta1).")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    min_lr: float | None = Field(None, ge=0, description="Learning rate at the end. Default: a tenth of --lr.")
    warmup: int | None = Field(
        None,
        ge=0,
        le=MAX_STEPS,
        description="Steps of linear warm-up. Default: a tenth of the steps, at most 100.",
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="Learning rate after warm-up: cosine, linear, constant, or wsd (stable, then a linear "
        "decay over the last fifth).",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment; the momentum of sgd.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Decay of the second moment.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay, on matrices only.")
    clip: float | None = Field(1.0, gt=0, description="Largest global gradient norm; 0 is off.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of activations dropped while training.")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Arithmetic of the matrix products: fp32; bf16, bfloat16 with float32 sums and weights; or auto, "
        "the fastest here: bf16 where the CPU has it (AMX or AVX512-BF16) and else fp32.",
    )
    recompute: Literal["auto", "none", "cheap", "block"] = Field(
        "auto",
        description="What is computed again in the backward pass instead of being kept: none; cheap, norms and "
        "activations; block, all but what enters a block of layers; auto, as little as memory allows. It changes no "
        "bits, only memory and speed.",
    )
    seed: int = Field(1337, ge=0, lt=2**63, description="Seed of the weights, of the order of the data and of dropout.")

    eval_every: int | None = Field(
        None,
        ge=1,
        le=MAX_STEPS,
        description="Steps between evaluations. Default: an eighth of the run, at most 250.",
    )
    eval_tokens: int | None = Field(
        None,
        ge=1,
        le=2**53,
        description="Validation tokens for one evaluation, at pinned places. "
        "Default: what costs about 5 % of the run, at most 32 batches.",
    )
    save_every: int | None = Field(
        None, ge=1, le=MAX_STEPS, description="Steps between checkpoints. Default: --eval-every."
    )
    keep: int = Field(3, ge=1, le=MAX_STEPS, description="Checkpoints kept besides the best.")
    stop_at: int | None = Field(
        None, ge=1, le=MAX_STEPS, description="Save and end after this step; the schedule stays."
    )
    early_stop: int | None = Field(
        None,
        ge=1,
        le=MAX_STEPS,
        description="Save and end when the validation loss has not improved for so many evaluations of --eval-every in "
        "a row; 0 is off. Default: off.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="What a NaN or infinite gradient does: stop the run, or skip the step.",
    )


# A preset is only its differences. S1 to S5 of the benchmarks are tiny to gpt2.
PRESETS: dict[str, dict[str, Any]] = {
    "minimal": dict(layers=1, heads=1, width=32, block_size=8, batch_size=2, spheres=2, workers=2, epochs=2,
                    tokenizer="byte", vocab_size=257, lr=1e-2),
    "tiny": dict(layers=2, heads=4, width=64, ff_width=128, block_size=16, batch_size=4, spheres=4,
                 vocab_size=381, steps=5000),
    "small": dict(batch_size=12, spheres=6, vocab_size=1024, steps=2000),
    "medium": dict(layers=6, heads=8, width=256, block_size=128, batch_size=16, spheres=8, vocab_size=4096,
                   steps=2000),
    "large": dict(layers=6, heads=6, width=384, block_size=256, batch_size=16, spheres=8, vocab_size=8192,
                  steps=5000, lr=6e-4),
    "gpt2": dict(layers=12, heads=12, width=768, block_size=256, batch_size=4, spheres=4, vocab_size=50304,
                 steps=10000, lr=6e-4, beta2=0.95),
}  # fmt: skip
DEFAULT_PRESET = "small"


def preset_values(name: object) -> dict[str, Any]:
    """The differences of a preset; InputError names the nearest known one."""
    name = name or DEFAULT_PRESET
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"There is no preset {shown(name)}: {nearest(str(name), PRESETS)}")
    return {"preset": name, **PRESETS[name]}


def merge(given: dict[str, Any], file: Path | None = None) -> tuple[Config, set[str]]:
    """Defaults, preset, file and `given` options -> a Config, and the names the user set himself.

    Given None values are ignored. Raises InputError for unknown keys and values out of range.
    """
    chosen = {key: value for key, value in read_toml(file).items() if key not in DATA_KEYS} if file else {}
    if isinstance(loss := given.get("loss"), str):  # the file's may have options that this one has not
        for key in {*_NEIGHBOURS} - {*LOSSES.get(loss, ())}:
            chosen.pop(key, None)
    chosen |= {key: value for key, value in given.items() if value is not None}
    for key in chosen:
        if key not in Config.model_fields:
            raise InputError(
                f"There is no option {shown(key)}{f' in {file}' if file else ''}: {nearest(key, Config.model_fields)}"
            )
    if chosen.get("steps") is not None and chosen.get("epochs") is not None:
        raise InputError(
            f"Both steps ({shown(chosen['steps'])}) and epochs ({shown(chosen['epochs'])}) were given: give one."
        )
    values = preset_values(chosen.get("preset"))
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if chosen.get(one) is not None:
            values.pop(other, None)
    return build(values | chosen), set(chosen)


def build(values: dict[str, Any]) -> Config:
    """Validated Config; a pydantic error becomes one InputError line an option."""
    values = dict(values)
    for key in OFF_AT_0:
        if values.get(key) in (0, "none"):
            values[key] = None
    try:
        return Config(**values)
    except ValidationError as error:
        lines = []
        for item in error.errors()[:MOST_LINES]:
            name = ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden":
                lines.append(f"There is no option {shown(name)}: {nearest(name, Config.model_fields)}")
                break  # the hint may name all that are known
            elif item["type"] == "literal_error":
                words = item["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
                lines.append(f"{flag(name)} cannot be {shown(item['input'])}: {nearest(str(item['input']), words)}")
            else:
                lines.append(f"{flag(name)} {shown(item['input'])}: {item['msg'].lower()}")
        if error.error_count() > MOST_LINES:
            lines.append(f"And {error.error_count() - MOST_LINES} options more.")
        raise InputError("\n".join(lines)) from None


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a flat TOML file; "clip = 0" means off. InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOML_BYTES + 1)  # no more: it may be a device that never ends
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    if len(data) > MAX_TOML_BYTES:
        raise InputError(f"{path} is not a configuration: it has more than {MAX_TOML_BYTES:,} bytes.")
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}.") from None
    except (ValueError, RecursionError):  # of tomllib, where it has no error of its own
        raise InputError(f"{path} is not valid TOML: a number is too long, or values are nested too deeply.") from None


def to_toml(config: Config, extra: dict[str, Any] | None = None) -> str:
    """The resolved configuration as flat TOML, each key under its help; `extra` keys come first."""
    lines = ["# The resolved configuration of this run. The same bits need the same spheres and batch_size."]
    for key, value in (extra or {}).items():
        lines.append(f"{key} = {_toml(value)}")
    for key, field in Config.model_fields.items():
        value = getattr(config, key)
        if value is None:
            lines += ["", f"# {field.description}", f"{key} = 0" if key in OFF_AT_0 else f"# {key} is off"]
        else:
            lines += ["", f"# {field.description}", f"{key} = {_toml(value)}"]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A value as TOML: JSON, but for characters that JSON writes as two halves, and for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
