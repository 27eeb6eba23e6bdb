"""One trial, without Ray: its cases, its run, its result, its checkpoints, its limits."""
