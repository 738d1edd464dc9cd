"""How many tokens of prompts, and bytes, went from prefill to decode: from the counters of the servers themselves."""

from __future__ import annotations

from dataclasses import dataclass

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
    from fourfold.common.mtp.probe import read_metrics, total

    at_prefill, at_decode = read_metrics(prefill.url), read_metrics(decode.url)
    if engine == "vllm":
        tokens = "vllm:prompt_tokens_by_source_total"
        computed, cached = "local_compute", "local_cache_hit"
        out = {
            "prefilled": total(at_prefill, tokens, source=computed) + total(at_prefill, tokens, source=cached),
            "received": total(at_decode, tokens, source="external_kv_transfer"),
            "computed": total(at_decode, tokens, source=computed),
            "cached": total(at_decode, tokens, source=cached),
            "transfers": total(at_decode, "vllm:nixl_xfer_time_seconds_count"),
            "size": total(at_decode, "vllm:nixl_bytes_transferred_sum"),
            "failed": total(at_decode, "vllm:nixl_num_failed_transfers_total"),
        }
    else:
        tokens, failed = "sglang:realtime_tokens_total", "sglang:num_transfer_failed_reqs_total"
        computed, cached = "prefill_compute", "prefill_cache"
        own = {
            "computed": total(at_decode, tokens, mode=computed),
            "cached": total(at_decode, tokens, mode=cached),
        }
        out = {
            **own,
            "prefilled": total(at_prefill, tokens, mode=computed) + total(at_prefill, tokens, mode=cached),
            "received": total(at_decode, "sglang:prompt_tokens_total") - sum(own.values()),
            "transfers": total(at_prefill, "sglang:kv_transfer_total_mb_count"),
            "size": total(at_prefill, "sglang:kv_transfer_total_mb_sum") * 2**20,
            "failed": total(at_prefill, failed) + total(at_decode, failed),
        }
    return {name: round(value) for name, value in out.items()}
