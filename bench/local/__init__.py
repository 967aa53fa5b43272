"""Measuring an artifact on this machine."""
