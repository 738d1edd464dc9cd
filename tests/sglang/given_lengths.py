"""SGLang's server, whose head drafts the lengths that the file ``GIVEN_LENGTHS`` lists, over and over (tests only).

Its log has a line for each step that asks for a length, and one for each pass of the head.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

from forked_server import ForkedServer


class GivenLengths(ForkedServer):
    """A `ForkedServer` of this module."""

    def command(self) -> list[str]:
        """SGLang's, with this module in its place."""
        python, flag, _, *arguments = super().command()
        return [python, flag, __name__, *arguments]


def main() -> None:
    from fourfold.common.mtp.draft_length import DraftLength
    from fourfold.sglang_ext.mtp_model import FourfoldMTP

    file, steps = Path(os.environ["GIVEN_LENGTHS"]), count()
    forward = FourfoldMTP.forward

    def choose(self: DraftLength, batch: int) -> int:
        lengths = json.loads(file.read_text())
        length = lengths[next(steps) % len(lengths)]
        print("LENGTH", length, flush=True)
        return length

    def read(self: FourfoldMTP, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        print("READ", len(input_ids), flush=True)
        return forward(self, input_ids, *args, **kwargs)

    with mock.patch.object(DraftLength, "choose", choose), mock.patch.object(FourfoldMTP, "forward", read):
        sys.argv[0] = "sglang.launch_server"
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
