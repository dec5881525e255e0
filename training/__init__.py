"""What a run needs around the loop of train.py: checks, records, checkpoints, dry run and evaluation."""
