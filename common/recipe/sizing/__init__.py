"""Memory of a recipe on its hardware, by part."""
