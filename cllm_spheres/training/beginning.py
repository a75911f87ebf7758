"""The model that a new run begins from (`train --from`): its shape is the run's, its weights are the first ones.

config.toml keeps where it lay and its fingerprint. The weights are read as the run begins and saved at once as step 0,
so that the run does not need it any more.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.config import Config, build, flag
from cllm_spheres.errors import InputError, shown
from cllm_spheres.exchange.source import Source, open_source
from cllm_spheres.model.families import FAMILIES
from cllm_spheres.model.shape import Shape

# A field of Config that the model decides; block_size may be less than the model's.
DECIDED = ("layers", "heads", "width", "ff_width", "bias", "vocab_size")


def with_model(config: Config, given: set[str], source: Source) -> tuple[Config, Source]:
    """The configuration with the model's shape, and the model cropped to the block that was asked for.

    given: the options that the user set himself. InputError where one contradicts the model, with both numbers, or
    where the model is of a family that no configuration can name.
    """
    if source.shape.family != Shape.family:
        kinds = [FAMILIES[family].title for family in (source.shape.family, Shape.family)]
        raise InputError(f"{source.path} is a {kinds[0]}, and train makes a {kinds[1]}: it can be read, not trained.")
    decided = {name: value for name, value in asdict(source.shape).items() if name in DECIDED}
    decided["tokenizer"] = source.tokenizer.kind
    for name, value in decided.items():
        asked = getattr(config, name)
        if name in given and asked is not None and asked != value:
            raise InputError(
                f"{flag(name)} {shown(asked)} contradicts --from: {source.path} has {name} {shown(value)}."
                " Leave it out."
            )
    block_size = config.block_size if "block_size" in given else source.shape.block_size
    source = source.cropped(block_size)
    return build(config.model_dump() | decided | {"block_size": block_size}), source


def origin_of(source: Source | None) -> dict[str, str | None]:
    """What config.toml says of the model."""
    return {} if source is None else {"from": str(source.path), "from_fingerprint": source.fingerprint}


def beginning(run: Path, config: Config, where: dict[str, Any]) -> Source | None:
    """The model that a run with this config.toml begins from; None for one that begins anew.

    InputError where it is not what it was when the run was made.
    """
    if where.get("from") is None:
        return None
    path = Path(where["from"])
    source = open_source(path)
    if source.fingerprint != where.get("from_fingerprint"):
        raise InputError(
            f"{path} is not the model that {run} was made with: its weights or its tokenizer have changed. Begin a new"
            " run."
        )
    return source.cropped(config.block_size)


def tokenizer_of(run: Path, where: dict[str, Any]) -> bytes | None:
    """The tokenizer.json with which a run's text has to be prepared again; None where it is made from the text."""
    if where.get("from") is None:
        return None
    if Store(run).steps():
        return Store(run).newest_good()[0].tokenizer_path.read_bytes()
    return open_source(Path(where["from"])).tokenizer_json
