"""The daemon that runs federations for agents which dial in."""

import os

# Before gRPC is loaded: it writes errors to stderr that are reported by us, in one line.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
