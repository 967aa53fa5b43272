"""Accuracy over seeds, and outputs on other processors."""
