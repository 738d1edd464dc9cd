"""Room on the data stack: no depth at which each call costs a page fault."""

from __future__ import annotations

import sys

import pytest
import stack_faults

from fourfold.common.data_stack import roomy


def test_no_depth_costs_page_faults() -> None:
    assert roomy(stack_faults.worst)() < stack_faults.CALLS / 10


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="this Python may keep a chunk of its data stack for the next")
def test_without_it_one_does() -> None:
    assert stack_faults.elsewhere() >= stack_faults.CALLS


def test_a_function_stays_what_it_is() -> None:
    @roomy
    def add(a: int, *rest: int, scale: int = 1) -> int:
        """Sum."""
        return (a + sum(rest)) * scale

    assert add(1, 2, 3, scale=2) == 12 and add.__doc__ == "Sum." and add.__name__ == "add"
    with pytest.raises(TypeError):
        add()  # type: ignore[call-arg]
