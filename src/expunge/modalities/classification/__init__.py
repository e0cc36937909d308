"""Classifiers: one class per record."""
