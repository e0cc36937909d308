"""Texts: rewriting, answers, coresets, entities, tools."""
