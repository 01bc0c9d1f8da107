"""Read the bytes of files, and find the state dicts in a tree of values.

`opening` gives a reader (`files`) for a path or a file object; `zip`, `gzip` and `json` read what several formats
share; `limits` bounds the work; `shift` moves spans from a part of a file to the whole; `state_dicts` walks the values.
"""
