"""Which parts of a Vision Transformer may go, which should go, and the surgery that takes them
out.
"""
