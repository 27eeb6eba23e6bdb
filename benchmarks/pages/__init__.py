"""The pages of the benchmarks: each is a pure function of the records in `results/`."""
