"""What everything else speaks in: records, errors, digests, files, patches, sessions, guards, registries. Imports nothing of expunge but itself."""
