"""From an example to a tokenized row: columns, tokens, labels, loss weights, and the tables that store them."""
