"""A configuration and prepared text -> a run: planned, launched, trained, evaluated, saved, resumed."""
