"""From a name to a model with its weights in place, ready to train or to answer."""
