"""How many deletions a design can serve before it must be trained anew."""
