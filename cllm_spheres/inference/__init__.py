"""A checkpoint and a prompt -> text: cache, sampling, generation."""
