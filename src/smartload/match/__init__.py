"""Pair the names of a file with the names of a model, or refuse with the reason. Pure: no tensor, no file."""
