"""This machine and a wanted run -> findings: what is there, what is missing, and what to do about it."""
