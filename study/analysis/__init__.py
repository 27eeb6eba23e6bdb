"""Pure functions of a study's records: the front, importance, choices compared."""
