"""What puts a run together: tokenizer and chat format, models, trainer. Commands call it, it calls all below."""
