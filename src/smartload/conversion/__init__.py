"""Make a clean file of any checkpoint, and compare two: take the one state dict of each, write it, or find differences.

`weights` takes the state dict under clean names; `write` and `diff` go on from there. Imported only when called.
"""
