"""Data sources of kartina: each answers `read(positions)` with a batch that is a pure function of (seed, position)."""
