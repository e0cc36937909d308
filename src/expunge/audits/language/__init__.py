"""Checks of language models."""
