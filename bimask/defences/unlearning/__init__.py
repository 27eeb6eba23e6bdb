"""Defences that make the backdoor fire, and unlearn it."""
