"""Text and tokens: tokenizers, documents of any format, and shards, read."""
