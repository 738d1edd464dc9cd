"""SGLang's server, whose head drafts the lengths that the file ``GIVEN_LENGTHS`` lists, over and over (tests only).

Its log has a line for each step that asks for a length, one for each pass of the head, and one for each entry of the
head's KV cache. With ``GIVEN_ALWAYS`` the head reads in every step.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from contextlib import ExitStack
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
    import torch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from fourfold.common.mtp.draft_length import DraftLength
    from fourfold.sglang_ext import mtp_worker
    from fourfold.sglang_ext.mtp_model import FourfoldMTP

    file, steps = Path(os.environ["GIVEN_LENGTHS"]), count()
    forward, store, entries = FourfoldMTP.forward, MHATokenToKVPool.set_kv_buffer, []

    def choose(self: DraftLength, batch: int) -> int:
        lengths = json.loads(file.read_text())
        length = lengths[next(steps) % len(lengths)]
        print("LENGTH", length, flush=True)
        return length

    def read(self: FourfoldMTP, input_ids: Any, positions: Any, *args: Any, **kwargs: Any) -> Any:
        print("FILL" if self._filling_cache else "READ", len(input_ids), flush=True)
        entries.clear()
        result = forward(self, input_ids, positions, *args, **kwargs)
        for position, entry in zip(positions.tolist(), entries[-1].tolist(), strict=True):
            print("ENTRY", position, *entry)
        return result

    def remember(self: Any, layer: Any, loc: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        both = torch.cat([key.flatten(1), value.flatten(1)], 1).float()
        mix = torch.randn(both.shape[1], 3, generator=torch.Generator().manual_seed(0))
        entries.append(both @ mix)
        return store(self, layer, loc, key, value, *args, **kwargs)

    with ExitStack() as patches:
        changes = [(DraftLength, "choose", choose), (FourfoldMTP, "forward", read)]
        changes.append((MHATokenToKVPool, "set_kv_buffer", remember))
        if "GIVEN_ALWAYS" in os.environ:
            changes.append((mtp_worker, "obstacle", lambda runner: "a test wants it"))
        for owner, name, change in changes:
            patches.enter_context(mock.patch.object(owner, name, change))
        sys.argv[0] = "sglang.launch_server"
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
