"""Timings and ablations. Nothing here is imported by the product or by its tests."""
