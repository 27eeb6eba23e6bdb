"""A suspect, seen without its trigger: searched triggers, latent distances, risk, audit."""
