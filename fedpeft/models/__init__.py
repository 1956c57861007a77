"""Base models, PEFT methods, the trainable state and adapter folders.

The only room that imports transformers, peft and bitsandbytes. `methods` and `trainable` (the wire state and
the frozen digest) are cheap to import; the other modules load these libraries: `base` (model and tokenizer),
`attach`, `export` (adapter folders), `options` (static checks of a run file).
"""

import logging
import os

# A model's configuration can name attention code on the hub, which transformers would fetch and run where the
# package `kernels` is installed.
os.environ["USE_HUB_KERNELS"] = "NO"

# bitsandbytes reports an optional kernel that it lacks, at its import, on every terminal.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
