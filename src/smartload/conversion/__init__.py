"""Make a clean file of any checkpoint: take its one state dict, write it, compare two. Imported only when called."""
