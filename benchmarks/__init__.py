"""Problems, runs and side-by-side comparisons; a module with a command line runs as ``python -m benchmarks.name``."""
