"""Text that comes with the project, found by `importlib.resources`."""
