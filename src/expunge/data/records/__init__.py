"""Records in memory: augmentation, memories, worst cases, neighbours, manipulation, protection."""
