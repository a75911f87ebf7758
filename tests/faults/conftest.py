"""The corpora that the trainings of these tests read."""

from tests.runs import char_corpus, corpus  # noqa: F401
