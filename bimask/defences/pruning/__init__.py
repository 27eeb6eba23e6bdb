"""Defences that take channels out."""
