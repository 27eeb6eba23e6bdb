"""What detectors are worth, clean and under attack."""
