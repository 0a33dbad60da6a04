"""From an example to a tokenized row: what a row is for each stage, its tokens, its labels, its loss weights."""
