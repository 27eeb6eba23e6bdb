"""What takes a backdoor out of a model."""
