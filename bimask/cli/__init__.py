"""`python -m bimask`: one command a file, put together in `bimask.__main__`."""
