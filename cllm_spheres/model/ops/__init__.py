"""The compiled ops of each dtype, with one signature: they read their operands from a record."""
