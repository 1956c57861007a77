"""Runs on the daemon: the supervisor, the hosts of models, joining agents, the service of people."""
