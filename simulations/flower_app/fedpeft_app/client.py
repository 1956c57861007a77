"""The `ClientApp`, with one torch thread: more would change the results' last bits."""

import torch

import fedpeft.flower.client_app as _client

torch.set_num_threads(1)
app = _client.app
