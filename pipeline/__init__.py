"""Recipes, run folders, and the chain from a dense model to its measured artifacts."""
