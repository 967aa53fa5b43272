"""Estimated latencies compared with measured ones."""
