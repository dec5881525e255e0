"""What the scripts need besides the model and the training loop. Readers of train.py can skip it."""
