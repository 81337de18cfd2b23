"""How fast and how large, a question a file: `python -m benchmarks.NAME --help`; tables are in docs/performance.md."""
