"""Pair the keys of a file with the keys of a model, or refuse with the reason. Pure: no tensor, no file.

`search.match` is the entry. It takes `candidates` (a prefix removed from the file's keys, and a prefix added to them),
tries each with `fit`, chooses among complete fits with `choose`, and makes of the chosen one a `plan`, or else a
refusal with `hints`. `standalone` cleans the keys of a file where there is no model.
"""
