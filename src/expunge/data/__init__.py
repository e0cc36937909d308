"""What methods learn from, made from what was given: rewriting, coresets, manipulation, shields."""
