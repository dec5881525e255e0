"""Text to train on and to score: the rows of files."""
