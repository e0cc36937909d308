"""What the commands demo, demo-llm and demo-images run."""
