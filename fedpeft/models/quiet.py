"""Keep the libraries underneath off the terminal: their advice is for people who call them directly."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

_CHATTY = ("peft", "bitsandbytes", "huggingface_hub")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, log lines below ERROR and progress bars of transformers, peft and bitsandbytes.

    What was set before is set again afterwards. Python's warning filters are process-wide, so a thread that
    warns meanwhile is silenced too.
    """
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return what an error says as one line of at most `limit` characters, else the name of its type."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
