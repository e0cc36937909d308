"""Who was trained on: membership attacks, population-wide and per example."""
