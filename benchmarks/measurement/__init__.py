"""Measurements compared with repetitions, and with those of other tools."""
