"""Removing what a mask does not keep: slicing plans, compaction, constant folding, dead-weight
search.
"""
