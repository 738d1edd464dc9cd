"""Loggers whose records an engine shows.

vLLM configures only the logger tree ``vllm`` and SGLang the root logger, so inside vLLM a record
must come from below ``vllm`` to be printed at level INFO.
"""

import logging
import sys


def get_logger(name: str) -> logging.Logger:
    """Return the logger for the module ``name``, below ``vllm`` in a process that has vLLM loaded."""
    return logging.getLogger(f"vllm.{name}" if "vllm" in sys.modules else name)
