"""Benchmarks: each module prints one measured number, and with `--json` a line for machines."""
