"""Checks of classifiers, regressors and their data."""
