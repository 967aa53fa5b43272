"""Errors, atomic files, strict JSON, console output and the zig compiler: what every package may
import.
"""
