"""Worker processes over shared memory: places, barriers, phases, and Node Zero who commands them."""
