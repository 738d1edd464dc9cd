"""Proof levels of recipes: schema, parser, environment, configuration, rules."""
