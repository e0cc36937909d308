"""What brings it back: relearning, small changes of the weights, what is left inside."""
