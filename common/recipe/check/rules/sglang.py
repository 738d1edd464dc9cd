"""Rules on SGLang's own options."""

from __future__ import annotations

from fourfold.common.recipe.check.rules.case import Case, Said, rule

VERSIONS = "==0.5.23"


@rule(
    "page-size-rewritten",
    "warning",
    "the attention backend of DeepSeek-V4 sets 256 (measured with SGLang 0.5.23's resolution)",
    sglang=VERSIONS,
)
def _page_size(case: Case) -> Said:
    for role in case.roles:
        size = role.number("page-size")
        if case.deepseek_v4 and size and size != 256:
            yield role.where("page-size"), f"{size} becomes 256 on DeepSeek-V4 without a word; write 256"


@rule(
    "mamba-no-buffer",
    "error",
    "validate_mamba_no_buffer in sglang/srt/arg_groups/mamba_hook.py",
    sglang=VERSIONS,
)
def _no_buffer(case: Case) -> Said:
    for role in case.roles:
        if role.get("mamba-radix-cache-strategy") != "no_buffer" or role.get("disable-radix-cache") is True:
            continue
        missing = []
        if role.get("disable-overlap-schedule") is not True:
            missing.append("disable-overlap-schedule: true")
        if role.number("page-size", 1) != 1:
            missing.append("page-size: 1")
        if role.get("attention-backend") == "trtllm_mha":
            missing.append("another attention-backend than trtllm_mha")
        if missing:
            yield (
                role.where("mamba-radix-cache-strategy"),
                f"no_buffer needs {', '.join(missing)}; set that, or the strategy auto",
            )


@rule(
    "handshake-timeouts",
    "note",
    "sglang/srt/environ.py: 300 seconds; published GB200 and GB300 recipes set 100000",
    sglang=VERSIONS,
)
def _timeouts(case: Case) -> Said:
    if case.pair() is None or not case.cuda:
        return
    for role in case.roles:
        for name in ("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", "SGLANG_DISAGGREGATION_WAITING_TIMEOUT"):
            if role.variable(name, 300) <= 300:
                yield (
                    role.where(name, "env"),
                    f"{name} is {role.variable(name, 300)} seconds; requests that wait longer for their KV "
                    "cache, as under full load, are dropped: expected more",
                )
