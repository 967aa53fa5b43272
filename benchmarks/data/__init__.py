"""Measurements of reading data."""
