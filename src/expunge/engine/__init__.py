"""Runs: one method on one request, stacks of models trained at once, jobs side by side."""
