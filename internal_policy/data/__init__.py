"""Prompts, templates, responses, benchmarks, and the arithmetic task of the embedded models."""
