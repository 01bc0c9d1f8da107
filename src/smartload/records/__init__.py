"""Hold what one stage of a load hands to the next. Pure: no torch, no files.

`checkpoint` and `entries` are what a format reads, `requests` what a caller asks for, `report` what a load gives back,
`problems` why it is refused. `keys`, `wrappers` and `text` are functions on names.
"""
