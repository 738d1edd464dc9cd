"""What only the engine or the hardware can tell of a recipe that was chosen by traits, as lines for its notes."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.common.recipe.dayzero.drafting import Drafting
from fourfold.common.recipe.dayzero.layout import Demand, Layout
from fourfold.common.recipe.dayzero.source import Found
from fourfold.common.recipe.schema import HardwareSheet
from fourfold.common.recipe.sizing.cache import CacheFormat
from fourfold.common.recipe.sizing.traits import Traits
from fourfold.common.recipe.sizing.weights import Weight

FAR = 0.05  # a difference between the weights' size and what the sizes account for that is worth a line


@dataclass(frozen=True)
class Model:
    """A model, sized.

    Attributes:
        stored: its weights as the checkpoint has them.
        parts: as the engine holds them: quantised while loading, without drafts that are not used.
        cache: formats that were chosen.
        nvfp4: whether 16-bit weights are quantised while loading.
    """

    found: Found
    name: str
    traits: Traits
    stored: list[Weight]
    parts: list[Weight]
    cache: CacheFormat
    nvfp4: bool

    @property
    def accounted(self) -> float:
        """Bytes of the checkpoint that the sizes account for."""
        return sum(part.bytes for part in self.stored)

    @property
    def scale(self) -> float:
        """Bytes of the checkpoint for each of these, at least 1."""
        return max(1.0, self.found.bytes / self.accounted) if self.found.bytes else 1.0


def how(sheet: HardwareSheet, layout: Layout, demand: Demand, workload: str) -> str:
    """How the layout was chosen."""
    world = layout.parallel.world
    return (
        f"Chosen by traits: the smallest layout on {sheet.id} that holds the weights ({layout.weights / 1e9:.1f} GB, "
        f"{layout.weights / 2**30:.1f} GiB on each of {world} rank{'s' * (world > 1)}) in "
        f"{layout.budget / 1e9:.0f} GB with {layout.sequences} requests of {demand.tokens} tokens a data rank "
        f"({layout.sequence / 1e6:.0f} MB each). The {workload} workload's lengths are this command's, not measured."
    )


def confirmations(
    model: Model, sheet: HardwareSheet, layout: Layout, drafts: Drafting, unknown: tuple[str, ...]
) -> list[str]:
    """A line for each doubt."""
    found, traits, accounted = model.found, model.traits, model.accounted
    architecture = found.architecture or "no architecture (config.json names none)"
    out = [f"Confirm that the engines have a class for {architecture}: fourfold recipe check (level L3 asks them)."]
    out += [f"Confirm the unknown trait {line}. It was not read." for line in unknown]
    if found.bytes is None:
        out.append(
            "Confirm the size of the weights: there is no index and no file of them; it follows from config.json."
        )
    elif abs(found.bytes / accounted - 1) > FAR:
        out.append(
            f"Confirm the sizes: the weights hold {found.bytes / 1e9:.2f} GB, what is understood of config.json makes "
            f"{accounted / 1e9:.2f} GB. Layouts were chosen with the larger."
        )
    out.append(
        f"Confirm the memory: {layout.weights / 1e9:.1f} GB of weights a rank is computed; see the engine's log "
        "(fourfold recipe fit shows it by part)."
    )
    if drafts.method:
        out.append(
            f"Confirm the acceptance of {drafts.tokens} {drafts.method} tokens a step: none is published for it "
            "(fourfold mtp probe, or the engine's metrics); fewer where it is low."
        )
    if model.cache.kv == "fp8":
        out.append("Confirm that answers with the FP8 cache are as good as with a BF16 one (kv-cache-dtype).")
    four_bits = {part.format for part in model.parts} & {"nvfp4", "mxfp4"}
    if four_bits and "fp4" not in sheet.peak_flops and sheet.compute_capability:
        out.append(
            f"Confirm that there are kernels for {' and '.join(sorted(four_bits))} weights on {sheet.gpu}, which has "
            "no FP4 arithmetic."
        )
    if model.nvfp4:
        out.append("Confirm that answers with NVFP4 weights are good enough (fourfold bench quality).")
    if traits.experts:
        out.append(
            "Confirm the expert kernels: backends are the engines' automatic choice; compare --moe-backend and "
            "--moe-runner-backend."
        )
    if any(layer.mixer in ("gdn", "kda", "mamba2") for layer in traits.layers):
        out.append("Confirm the recurrent state: prefix caching and speculation depend on how each engine keeps it.")
    if found.raw.get("auto_map"):
        out.append(
            "Confirm that no code of the repository is needed: config.json names some (auto_map), and this recipe "
            "does not trust it. Read it before adding trust-remote-code."
        )
    if found.template is not True:
        out.append("Confirm the chat template: none was found beside config.json.")
    if traits.vision:
        out.append("Confirm the image encoder: only its size was looked at.")
    if sheet.compute_capability:
        out.append("Confirm tool and reasoning parsers: none was chosen.")
        out.append(
            "Confirm the transfer of this cache before prefill and decode are separated; this recipe aggregates."
        )
    return out
