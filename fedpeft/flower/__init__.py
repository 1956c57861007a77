"""The run on Flower: server app, client apps, and the grids that carry messages."""
