"""`fourfold recipe rehearse` on SGLang: a recipe as it is, and with MTP, of a small random model."""

from __future__ import annotations

import pytest
from forked_server import forked

from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.rehearsing.rehearse import Result, rehearse


@pytest.fixture(scope="module")
def aggregated(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return rehearse(Catalogue(), "cpu/smollm2", "sglang", tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def mtp(aggregated: Result, tmp_path_factory: pytest.TempPathFactory) -> Result:
    logs = tmp_path_factory.mktemp("logs")
    with forked("rehearse"):
        return rehearse(Catalogue(), "cpu/smollm2-mtp", "sglang", logs, aggregated.without)


def test_an_aggregated_recipe(aggregated: Result) -> None:
    assert aggregated.ok, aggregated.checks
    assert [check.name for check in aggregated.checks] == ["answers", "content", "probabilities"]


def test_a_recipe_with_mtp(mtp: Result) -> None:
    assert mtp.ok, mtp.checks
    assert [check.name for check in mtp.checks] == [
        *("answers", "speculation", "drafts", "acceptance", "content", "probabilities")
    ]
    words = next(check.detail for check in mtp.checks if check.name == "acceptance").split()
    drafts, accepted, drafted = int(words[0]), int(words[3]), int(words[5])
    assert drafted == 3 * drafts and 0.5 * drafted < accepted < 0.95 * drafted
    changed = {change.what: change.used for change in mtp.substitutions}
    assert changed["speculative-draft-model-path"] == "the replica's head"
