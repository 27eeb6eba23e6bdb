"""What MLflow is told, and the queue in front of it."""
