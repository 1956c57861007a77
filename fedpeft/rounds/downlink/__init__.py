"""The global state on its way to clients: whole, as steps, or one per client."""
