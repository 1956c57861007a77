"""Protobuf stubs, generated from protos/fedpeft/v1 by `make protos`; only `fedpeft.wire` and the daemons import them."""
