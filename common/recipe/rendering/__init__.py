"""Launch files of recipes, one module for each target."""
