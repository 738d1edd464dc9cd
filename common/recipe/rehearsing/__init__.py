"""Recipes run on a processor, with a small model in the published layout."""
