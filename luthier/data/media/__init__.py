"""Media of examples (images, videos and audio): from the tags and columns of a row to the tokens that stand for them.

`kinds` says what differs between them. `items` puts those of a row in their places, `reader` and `frames` open and
measure files, `blocks` asks the processor of the model which text stands for an item, and `expand` writes these texts
into rows and finds their tokens.
"""
