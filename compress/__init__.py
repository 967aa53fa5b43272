"""Compression: which parts of a Vision Transformer to remove, and the surgery that removes them."""
