"""From a conversation to text and tokens: chat formats, the model's own chat template, tool calls, thinking."""
