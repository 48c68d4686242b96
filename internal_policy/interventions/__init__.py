"""Change what a module writes, and see what becomes of the final policy: ablation and activation patching."""
