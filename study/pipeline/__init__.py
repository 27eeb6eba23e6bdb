"""The steps of a study, in their order."""
