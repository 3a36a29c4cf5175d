"""Finds the vision tokens of a prompt and their place in the token grids, for every model family."""
