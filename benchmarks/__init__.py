"""How fast and how large: `python -m benchmarks --help`; the tables are in docs/performance.md."""
