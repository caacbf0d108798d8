"""Fits the stages of a recipe, one at a time. This room may reach every other room; none reaches it."""
