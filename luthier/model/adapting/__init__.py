"""What adapter methods share: which weights they go on, how they start, how they are merged and checked."""
