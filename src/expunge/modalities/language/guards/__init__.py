"""Inference-time guards of language models, one kind per file."""
