"""Hold what one stage of a load hands to the next: keys, shapes, spans of bytes, plans. Pure: no torch, no files."""
