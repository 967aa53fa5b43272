"""Recipes, run folders, and the chain from a dense model to a measured artifact."""
