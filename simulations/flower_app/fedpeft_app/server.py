"""The `ServerApp`."""

from fedpeft.flower.server_app import server_app
from fedpeft.simulation.engine import serve

app = server_app(serve)
