"""The daemon that runs federations for agents which dial in."""
