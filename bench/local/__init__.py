"""Measuring artifacts on this machine."""
