"""Changes of modules before and after a process imports them."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from fourfold.vllm_ext.when_imported import when_imported

NAME = "imported_late"


@pytest.fixture(autouse=True)
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{NAME}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))


def double(module: Any) -> None:
    module.value *= 2


def test_each_change_is_made_once_whenever_the_module_comes() -> None:
    when_imported(NAME, double)
    when_imported(NAME, double)
    assert NAME not in sys.modules
    module = importlib.import_module(NAME)
    assert module.value == 4
    when_imported(NAME, double)
    assert module.value == 8
    assert importlib.reload(module).value == 1  # nothing waits any more


def test_a_change_that_fails_leaves_the_module(caplog: pytest.LogCaptureFixture) -> None:
    def fail(module: Any) -> None:
        raise AttributeError("no such class")

    when_imported(NAME, fail)
    with caplog.at_level(logging.WARNING):
        assert importlib.import_module(NAME).value == 1
    assert f"{NAME} is as vLLM has it: no such class" in caplog.text
    with pytest.raises(AttributeError):  # whoever asks now hears it
        when_imported(NAME, fail)


def test_a_module_that_is_not_there_stays_so() -> None:
    when_imported(f"{NAME}r", double)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{NAME}r")
