"""Read the bytes of files: open, zip, gzip, JSON, limits; and find the state dicts in a tree."""
