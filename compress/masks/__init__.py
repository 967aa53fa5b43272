"""Structured masks: the values, how they are learned or ranked, and the dense network that computes
with them.
"""
