"""Compression of adapter deltas: lossy forms of a tensor, their exact bytes, and files of adapters.

Everything here works on NumPy arrays and knows nothing of models, rounds or sockets.
"""

from fedpeft.codec.coded import decode, decode_up_to, encode
from fedpeft.codec.entropy import ternary_entropy_bits
from fedpeft.codec.expert_file import Expert, ReadBounds, read_expert, write_expert
from fedpeft.codec.feedback import residual_after, with_residual
from fedpeft.codec.masks import BernoulliMask, PublicSource, RandomKMask, tensor_stream
from fedpeft.codec.named import Distortion, compress_named, dense_named, distortion
from fedpeft.codec.position_coders import CODERS, DEFAULT_CODER
from fedpeft.codec.quantise import default_channel_axis, quantise
from fedpeft.codec.signs import sign_with_scale
from fedpeft.codec.sparse import dare, random_k, select_unbiased_random_k, top_k
from fedpeft.codec.tensors import (
    DenseTensor,
    Encoded,
    EncodedTensor,
    MaskedTensor,
    QuantisedTensor,
    SignTensor,
    SparseTensor,
    TernaryTensor,
    identical,
)
from fedpeft.codec.ternary import (
    FixedScale,
    LeastSquaresScale,
    ScaleRule,
    StdScale,
    rescale,
    ternarise,
    ternarise_together,
)

__all__ = [
    "CODERS",
    "DEFAULT_CODER",
    "BernoulliMask",
    "DenseTensor",
    "Distortion",
    "Encoded",
    "EncodedTensor",
    "Expert",
    "FixedScale",
    "LeastSquaresScale",
    "MaskedTensor",
    "PublicSource",
    "QuantisedTensor",
    "RandomKMask",
    "ReadBounds",
    "ScaleRule",
    "SignTensor",
    "SparseTensor",
    "StdScale",
    "TernaryTensor",
    "compress_named",
    "dare",
    "decode",
    "decode_up_to",
    "default_channel_axis",
    "dense_named",
    "distortion",
    "encode",
    "identical",
    "quantise",
    "random_k",
    "read_expert",
    "rescale",
    "residual_after",
    "select_unbiased_random_k",
    "sign_with_scale",
    "tensor_stream",
    "ternarise",
    "ternarise_together",
    "ternary_entropy_bits",
    "top_k",
    "with_residual",
    "write_expert",
]
