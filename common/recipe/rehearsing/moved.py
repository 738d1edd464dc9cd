"""How many tokens of prompts, and bytes, went from prefill to decode: from the counters of the servers themselves."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.common.recipe.schema import RoleName
from fourfold.common.serving import EngineServer


@dataclass(frozen=True)
class Moved:
    """What the servers counted while `requests` were asked, in tokens of the prompts.

    Attributes:
        prefilled: the prefill server computed, or had.
        received: the decode server took from it.
        computed: the decode server computed itself; ``cached``: it had.
        transfers: ended ones, of ``size`` bytes in all; ``failed`` ones.
    """

    requests: int
    prefilled: int
    received: int
    computed: int
    cached: int
    transfers: int
    size: int
    failed: int

    @property
    def ok(self) -> bool:
        """Whether decode took every prompt from prefill, but for the last token of each, from which it goes on."""
        took = 0 < self.received <= self.prefilled and self.computed <= self.requests
        return took and not self.cached and self.transfers >= self.requests and not self.failed

    @property
    def detail(self) -> str:
        """One clause."""
        total = self.received + self.computed + self.cached
        took = f"decode took {self.received} of {total} tokens of {self.requests} prompts from prefill"
        if not self.received:
            took = f"decode took none of {total} tokens of {self.requests} prompts from prefill"
        return (
            f"{took}, in {self.transfers} transfers of {self.size} bytes ({self.failed} failed), and computed "
            f"{self.computed} itself; prefill computed {self.prefilled}"
        )


def counts(engine: str, prefill: EngineServer, decode: EngineServer) -> dict[str, int]:
    """What two servers have counted since they started, by the names of `Moved`."""
    from fourfold.common.mtp.probe import read_metrics

    at = {"prefill": read_metrics(prefill.url), "decode": read_metrics(decode.url)}

    def total(role: RoleName, name: str, *sources: str) -> float:
        """The sum of a metric, of all its samples or of those of some sources."""
        of = [(labels, value) for (metric, labels), value in at[role].items() if metric == name]
        return sum(value for labels, value in of if not sources or any(text in sources for _, text in labels))

    if engine == "vllm":
        prompts = "vllm:prompt_tokens_by_source_total"
        out = {
            "prefilled": total("prefill", prompts, "local_compute", "local_cache_hit"),
            "received": total("decode", prompts, "external_kv_transfer"),
            "computed": total("decode", prompts, "local_compute"),
            "cached": total("decode", prompts, "local_cache_hit"),
            "transfers": total("decode", "vllm:nixl_xfer_time_seconds_count"),
            "size": total("decode", "vllm:nixl_bytes_transferred_sum"),
            "failed": total("decode", "vllm:nixl_num_failed_transfers_total"),
        }
    else:
        tokens, failed = "sglang:realtime_tokens_total", "sglang:num_transfer_failed_reqs_total"
        own = {
            "computed": total("decode", tokens, "prefill_compute"),
            "cached": total("decode", tokens, "prefill_cache"),
        }
        out = {
            **own,
            "prefilled": total("prefill", tokens, "prefill_compute", "prefill_cache"),
            "received": total("decode", "sglang:prompt_tokens_total") - sum(own.values()),
            "transfers": total("prefill", "sglang:kv_transfer_total_mb_count"),
            "size": total("prefill", "sglang:kv_transfer_total_mb_sum") * 2**20,
            "failed": total("prefill", failed) + total("decode", failed),
        }
    return {name: round(value) for name, value in out.items()}
