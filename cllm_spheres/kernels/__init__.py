"""Jitted arithmetic only: buffers in, buffers out; no processes, no files, one thread."""
