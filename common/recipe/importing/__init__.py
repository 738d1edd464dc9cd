"""Recipes of others, read into ours."""
