"""Invertible pruning masks (Dunnett et al., NeurIPS 2025, arXiv 2509.15497)."""
