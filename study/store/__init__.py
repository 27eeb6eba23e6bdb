"""A study's folder as the truth: records, files, session, provenance."""
