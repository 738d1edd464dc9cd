"""`fourfold recipe rehearse` of prefill and decode apart on SGLang, with MTP in the decode role alone."""

from __future__ import annotations

from pathlib import Path

from forked_server import forked

from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.rehearsing.rehearse import proof, rehearse


def test_prefill_and_decode_apart(tmp_path: Path) -> None:
    with forked("rehearse"):  # the one server to compare with; prefill and decode are not
        result = rehearse(Catalogue(), "deepseek-v4-pro/gb200-disagg", "sglang", tmp_path)
    assert result.ok, result.checks
    assert [check.name for check in result.checks] == [
        *("answers", "apart", "transfer", "drafts", "acceptance", "content", "probabilities", "load")
    ]
    proven = proof(result)["apart"]
    assert proven["transport"].startswith("Mooncake") and proven["router"].startswith("sglang-router ")
    told = {change.what: change.used for change in result.substitutions}
    assert told["MC_FORCE_TCP"] == "1" and told["disaggregation-decode-retraction-backup"] == "cpu_tensor"
