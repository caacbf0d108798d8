"""The blocks that every model shares. This room knows torch and nothing else of the project."""
