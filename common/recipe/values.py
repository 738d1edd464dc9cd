"""Which arguments and environment variables a recipe may give, and which values.

Values are what JSON and a command line can both say. What `Parallel`, the address of a node or fourfold's keys say is
derived (`launch`) and never an argument; neither is a variable with which a recipe could start a program of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

OPTION = re.compile(r"[a-z0-9][A-Za-z0-9._-]{0,127}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
LONGEST = 8192  # characters of one value
LARGEST = 1 << 63
# What `Parallel`, the address of a node or fourfold's own keys say, by engine, with the parsers' other names for it;
# and files of further arguments, which would get around every check.
DERIVED: dict[str, frozenset[str]] = {
    "vllm": frozenset(
        "model host port tensor-parallel-size pipeline-parallel-size data-parallel-size decode-context-parallel-size "
        "enable-expert-parallel data-parallel-size-local data-parallel-start-rank data-parallel-address "
        "data-parallel-rpc-port nnodes node-rank master-addr master-port headless additional-config config".split()
    ),
    "sglang": frozenset(
        "model model-path host port tp tp-size tensor-parallel-size pp pp-size pipeline-parallel-size attn-dp-size "
        "attention-data-parallel-size dp dp-size data-parallel-size enable-dp-attention ep ep-size "
        "expert-parallel-size dcp-size decode-context-parallel-size nnodes node-rank dist-init-addr nccl-init-addr "
        "disaggregation-mode config".split()
    ),
}
# Variables by which the dynamic linker, a shell, Python or a compiler's driver runs a program of the recipe's choice.
_RUNS = frozenset("PATH HOME SHELL IFS ENV BASH_ENV PROMPT_COMMAND CC CXX CUDAHOSTCXX NVCC NVCC_PREPEND_FLAGS".split())
_RUNS_PREFIX = ("LD_", "DYLD_", "PYTHON", "BASH_FUNC_", "PERL5", "GIT_")
_HARMLESS = frozenset({"PYTHONHASHSEED", "PYTHONUNBUFFERED"})


def derived(engine: str, option: str) -> str | None:
    """The derived option that ``option`` is, abbreviates (argparse takes a unique beginning), negates or reaches into.

    >>> derived("vllm", "tensor_parallel_si")
    'tensor-parallel-size'
    """
    name = option.replace("_", "-").split(".")[0]
    for stem in (name, name.removeprefix("no-")):
        if stem in DERIVED[engine]:
            return stem
        for known in sorted(DERIVED[engine]):
            if len(stem) > 2 and known.startswith(stem):
                return known
    return None


def check_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Options by long name.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    for name, value in given.items():
        if not OPTION.fullmatch(name):
            raise ValueError(f"option {name!r}: expected a long option's name without dashes in front")
        check_value(value, name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.startswith("-") and not _is_number(text):
                raise ValueError(f"{name}: {text!r} would be read as another option; expected a value without a dash")
    return given


def check_variables(given: dict[str, Any]) -> dict[str, Any]:
    """Environment variables.

    Raises:
        ValueError: naming the variable, its value and what is allowed.
    """
    for name, value in given.items():
        if not VARIABLE.fullmatch(name):
            raise ValueError(f"environment variable {name!r}: expected letters, digits and underscores")
        if name in _RUNS or (name.startswith(_RUNS_PREFIX) and name not in _HARMLESS):
            raise ValueError(
                f"environment variable {name!r}: decides which program runs; a recipe sets variables of the engine "
                "and its libraries only"
            )
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(f"{name}: {value!r}; expected text or a number (quote true and false)")
        check_value(value, name)
    return given


def check_value(value: Any, where: str) -> None:
    """Refuse what neither JSON nor a command line can say.

    Raises:
        ValueError: names ``where``, the value and what is allowed.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            check_value(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_value(inner, f"{where}[{i}]")
    elif isinstance(value, str):
        if "\n" in value or next(control_characters(value), None):
            raise ValueError(f"{where}: {value!r}; expected one line of printable text")
        if len(value) > LONGEST:
            raise ValueError(f"{where}: {value[:40]!r}... of {len(value)} characters; expected at most {LONGEST}")
    elif value is None or isinstance(value, bool):
        return
    elif isinstance(value, (int, float)):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {value!r}; expected a finite number")
        if abs(value) >= LARGEST and isinstance(value, int):
            raise ValueError(f"{where}: a number of {value.bit_length()} bits; expected one below 2**63")
    else:
        raise ValueError(f"{where}: {value!s}; expected text (quote it), a number, true, false, a list or a mapping")


def control_characters(text: str) -> Iterator[str]:
    """Characters that a terminal acts on or that hide others: control codes but newline and tab, half surrogate pairs,
    changes of writing direction, line separators.
    """
    for char in text:
        code = ord(char)
        if (
            (code < 32 and char not in "\n\t")
            or 127 <= code < 160
            or 0x200E <= code <= 0x200F
            or 0x2028 <= code <= 0x202E
            or 0x2066 <= code <= 0x2069
            or 0xD800 <= code <= 0xDFFF
            or code == 0xFEFF
        ):
            yield char


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
