"""Files: written whole or not at all, and those of strangers read without running them."""
