"""Defences that cut off activations."""
