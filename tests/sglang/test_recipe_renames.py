"""The table of renames is true of SGLang's sources: old names are not read, new ones are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from fourfold.common.recipe.check.renames import table


def sources() -> Path:
    """The package ``sglang.srt``, without importing it."""
    spec = importlib.util.find_spec("sglang")
    assert spec and spec.origin
    return Path(spec.origin).parent / "srt"


def test_the_table_is_true_of_sglang() -> None:
    srt = sources()
    fields = "\n".join(path.read_text() for path in (srt / "arg_groups" / "fields").glob("*.py"))
    flags = fields + (srt / "server_args.py").read_text()
    variables = (srt / "environ.py").read_text()

    def option(name: str) -> bool:
        return f"\n    {name.replace('-', '_')}: A[" in fields or f'"--{name}"' in flags

    def variable(name: str) -> bool:
        return re.search(rf"^    {name} = Env", variables, re.MULTILINE) is not None

    for entry in table().engines["sglang"].entries:
        if entry.env:
            assert not variable(entry.env), entry
            assert entry.to is None or variable(entry.to), entry
            named = re.search(rf"\b{entry.env}\b", variables) is not None or entry.env.startswith(
                "SGL_"
            )  # an alias, or the old prefix
            assert named is (entry.effect == "deprecated"), entry
        elif entry.option and entry.option != entry.to:
            assert option(entry.option) is (entry.effect == "deprecated" and entry.option != "speculative-algo"), entry
        new = entry.to_option or (entry.to if entry.option else None)
        assert new is None or option(new), entry
