"""Write a checkpoint into a model, or undo everything. The only folder that writes to a model."""
