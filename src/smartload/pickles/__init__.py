"""Read what a pickle says of storages, tensors, arrays and modules. Nothing that it names is imported or called."""
