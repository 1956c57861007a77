"""`fedpeft client`, `fedpeft run` and the commands of people to a server."""
