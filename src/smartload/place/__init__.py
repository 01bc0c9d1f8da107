"""Look at a model: its keys, its wrappers, its devices, and where each tensor must land. Moves nothing."""
