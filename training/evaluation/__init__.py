"""Scores of generated images; nothing here trains anything."""
