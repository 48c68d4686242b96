"""Internal policies of language models: entropies, target layer, figures (arXiv 2512.19673v3)."""
