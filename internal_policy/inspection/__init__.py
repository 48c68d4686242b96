"""Look into one prompt: entropies and top tokens of every internal policy, layer by token."""
