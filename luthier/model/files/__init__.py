"""Files that hold a model: folders, hubs and GGUF, read without loading weights."""
