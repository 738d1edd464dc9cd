"""``fourfold mtp train``: an MTP head for a model that has none, trained on text that the model writes itself."""
