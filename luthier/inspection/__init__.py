"""To look at rows: in the terminal, as a page, against the model's own template, and for what is wrong with them."""
