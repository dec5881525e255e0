"""What a training run needs around the mathematics: ranks, hardware, checkpoints, records, files, errors."""
