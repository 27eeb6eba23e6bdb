"""A protocol from start to end: its victims, a comparison for each net and data set, one table."""
