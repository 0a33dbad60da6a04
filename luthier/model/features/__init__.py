"""Models changed in their build: longer contexts, other attention, more blocks, skipped blocks, more tokens."""
