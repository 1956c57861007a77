"""The `ClientApp`. Flower wants an assignment here, not an import."""

import fedpeft.flower.client_app as _client

app = _client.node_app
