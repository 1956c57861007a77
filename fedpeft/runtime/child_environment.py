"""What a process that loads models is told of the environment of the one that started it.

Environments carry secrets: tokens of a hub, keys of a cloud, passwords in the addresses of proxies, the token
with which an agent enrolled. A process that reads what strangers sent has no use for them. So it gets the
variables that are named here, and those that whoever runs the machine names in the settings, and no others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping

from fedpeft.runtime.crash_points import ONCE, VARIABLE

LIBRARY_DEFAULTS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # worker processes are forked
    "TORCHDYNAMO_DISABLE": "1",  # bitsandbytes asks for it at import, for 1.5 s, and no bit depends on it
}
"""What libraries read at their import; commands set it unless the user did, and children get it."""

_NAMES = frozenset(
    {
        *LIBRARY_DEFAULTS,
        *("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TZ", "LANG", "LANGUAGE", "XDG_CACHE_HOME"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "GLIBC_TUNABLES"),
        *("HF_HOME", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_HUB_OFFLINE"),
        *("HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"),
        *("GRPC_VERBOSITY", VARIABLE, ONCE),
    }
)
_BEGINNINGS = (
    *("LC_", "PYTHON", "MALLOC_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "NUMBA_", "ATEN_", "ONEDNN_"),
    *("DNNL_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_"),
    *("HIP_", "ROCR_", "HSA_"),
)
_OF_NETWORKS = frozenset(
    {
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HF_ENDPOINT"),
    }
)


def child_environment(
    more: Collection[str] = (),
    *,
    network: bool = False,
    database: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Return the environment for a process that loads models and computes on one thread.

    Args:
        more: names of variables that whoever runs the machine lets it have.
        network: whether it may fetch models, through a proxy where one is set.
        database: whether it speaks to a server's database (libpq's variables).
        environment: of this process.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if name in _NAMES
        or name in more
        or name.startswith(_BEGINNINGS)
        or (network and name.upper() in _OF_NETWORKS)
        or (database and name.startswith("PG"))
    }
    path = os.pathsep.join(folder for folder in sys.path if folder)
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
