"""A first recipe for a model that nobody has seen, from its config.json and the index of its weights."""
