"""Recipes: launch plans as data, checked by the engines themselves and rehearsed on a CPU."""
