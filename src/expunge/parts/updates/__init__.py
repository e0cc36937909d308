"""Updates: loops and solves that move the weights of a session."""
