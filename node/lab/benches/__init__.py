"""The benchmarks of `dsd bench`, one in each file."""
