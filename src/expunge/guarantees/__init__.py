"""What is deleted with a guarantee: exact and certified deletion, streams of requests."""
