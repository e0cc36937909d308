"""Published unlearning benchmarks, read by name from folders as their authors ship them."""
