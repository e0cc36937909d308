"""Checks of models that draw, restore or match images."""
