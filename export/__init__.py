"""Turning a compact model into artifacts that edge runtimes run, each proven equal."""
