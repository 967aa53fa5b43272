"""Latency of graph forms, precisions and runtimes."""
