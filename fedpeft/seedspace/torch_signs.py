"""Signs in plain torch: needs neither a compiler nor a particular device."""

import torch

from fedpeft.seedspace.layout import CounterStream
from fedpeft.seedspace.philox import philox_torch


def torch_signs(stream: CounterStream, tensor_id: int, direction: int, blocks: torch.Tensor) -> torch.Tensor:
    """int64 [..., 128 * blocks] of +1 and -1 for int64 block numbers [..., blocks], on their device."""
    words = philox_torch(
        (blocks, *stream.counter_words(tensor_id)), (direction, stream.key_word), device=blocks.device
    )
    packed = torch.stack(words, dim=-1).unsqueeze(-1)  # [..., blocks, 4, 1]
    bits = (packed >> torch.arange(32, device=blocks.device)) & 1  # [..., blocks, 4, 32]
    return (2 * bits - 1).flatten(start_dim=-3)
