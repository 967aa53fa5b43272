"""Latency and memory on an NVIDIA GPU."""
