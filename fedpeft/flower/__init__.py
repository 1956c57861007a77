"""The run on Flower: server app, client app, strategies, and the in-process grid."""
