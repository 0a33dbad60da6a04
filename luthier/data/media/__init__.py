"""Images of examples: from the tags and columns of a row to the tokens that stand for them.

`items` puts the images of a row in their places, `reader` opens and measures them, `blocks` asks the processor of the
model which text stands for an image, and `expand` writes these texts into rows and finds their tokens.
"""
