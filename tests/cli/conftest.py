"""A corpus and a run for the console script."""

import pytest

from tests.runs import corpus, train_whole  # noqa: F401


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):  # noqa: F811
    """A small run that has ended: do not change it."""
    return train_whole(corpus, tmp_path_factory.mktemp("trained") / "run", steps=6).run
