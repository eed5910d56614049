"""Text to documents, tokens and batches; knows nothing of models."""
