"""Checkpoints on disk: atomic, verified, exact; and the lock of a run folder."""
