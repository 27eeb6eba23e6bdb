"""Defences that train on clean images and their labels."""
