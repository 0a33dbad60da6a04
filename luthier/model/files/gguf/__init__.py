"""GGUF files: their header, what they say of model and vocabulary, and how one is written."""
