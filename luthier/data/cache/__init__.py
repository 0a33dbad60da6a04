"""Tokenized rows on disk: Arrow tables, the cache and its key, eviction, and the folder `tokenized_path`."""
