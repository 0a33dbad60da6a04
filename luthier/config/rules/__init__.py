"""Rules between keys, as values: what must not be, why, and what to do about it."""
