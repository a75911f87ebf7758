"""A run with room for a prompt, and a server of it that the tests share."""

import pytest

from tests.runs import corpus, train_whole  # noqa: F401
from tests.web.served import Alone, Served


@pytest.fixture(scope="session")
def run(corpus, tmp_path_factory):  # noqa: F811
    """Bytes, a block of 64. Do not change it."""
    return train_whole(corpus, tmp_path_factory.mktemp("served") / "run", steps=6, block_size=64).run


@pytest.fixture(scope="session")
def alone(run):
    return Alone(run)


@pytest.fixture(scope="session")
def served(run):
    """A server with 4 slots and a queue of 8. Leave it idle."""
    with Served([run], ["--slots", 4, "--queue", 8, "--max-tokens", 10_000_000]) as server:
        yield server
