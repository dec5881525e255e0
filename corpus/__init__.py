"""Text to train on and to score: tokenizers, documents, rows of files."""
