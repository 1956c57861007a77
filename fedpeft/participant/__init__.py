"""Loading a run: as a simulation holds it, as a server does, and as one device takes part in it."""
