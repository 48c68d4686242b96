"""Prompts, templates, responses, benchmarks and the arithmetic of the embedded models."""
