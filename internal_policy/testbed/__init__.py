"""The embedded default: two small language models and the arithmetic that they solve."""
