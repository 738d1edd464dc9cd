"""What both engines are held to while loading: each engine's test module imports these and defines `start`.

``start(model, *arguments, ranks=1, settings=None)`` returns a server that is not yet running, with fourfold's settings
passed the engine's own way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import engine_checks
import pytest

from fourfold.common.errors import FourfoldError
from fourfold.common.quant.backends import Scheme
from fourfold.common.quant.checkpoint.convert import Options, convert
from fourfold.common.serving import EngineServer

FLAG = ["--quantization", "fourfold_nvfp4"]
FEW = engine_checks.QUESTIONS[:5]


class Start(Protocol):
    def __call__(
        self, model: Path, *arguments: str, ranks: int = 1, settings: dict[str, object] | None = None
    ) -> EngineServer: ...


def test_quantises_while_loading_over_two_ranks_with_bias(start: Start, tiny_bias: Path) -> None:
    with start(tiny_bias, *FLAG, ranks=2) as server:
        answers = engine_checks.ask(server, tiny_bias, FEW, 16)
        lines = engine_checks.fourfold_lines(server)
    engine_checks.check(answers, engine_checks.quantised_while_loading(tiny_bias))
    served = [line for line in lines if line.startswith("fourfold: nvfp4")]
    assert len(served) == 2 and "for 8 layers" in served[0]
    assert "quantised while loading, scales sweep, unweighted: `fourfold quantize` keeps more quality" in served[0]


def test_w4a4_checkpoint_of_modelopt_layout(start: Start, cut: Path, tmp_path: Path) -> None:
    convert(cut, tmp_path / "made", Options(format="modelopt", scheme=Scheme.W4A4))
    engine_checks.saturate(tmp_path / "made")
    with start(tmp_path / "made", *FLAG) as server:
        answers = engine_checks.ask(server, cut, FEW, 16)
        lines = engine_checks.fourfold_lines(server)
    engine_checks.check_w4a4(answers, tmp_path / "made", cut)
    assert any(line.startswith("fourfold: nvfp4 w4a4, backend cpu") for line in lines)


def test_a_checkpoint_that_names_fourfold_needs_no_flag_and_splits_over_ranks(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    convert(tiny, tmp_path / "made", Options(format="fourfold"))
    with start(tmp_path / "made", ranks=2) as server:
        answers = engine_checks.ask(server, tiny, FEW, 16)
    engine_checks.check(answers, engine_checks.reference_model(tmp_path / "made", tiny))


def test_fused_shards_keep_their_global_scales_where_the_stock_rule_is_wrong(
    start: Start, tiny: Path, tmp_path: Path
) -> None:
    made = engine_checks.own_scales(tiny, tmp_path / "made")
    with start(made, *FLAG) as server:
        answers = engine_checks.ask(server, tiny, FEW, 16)
    engine_checks.check(answers, engine_checks.reference_model(made, tiny))
    stock = engine_checks.collapse(engine_checks.reference_model(made, tiny), made)
    with pytest.raises(AssertionError):
        engine_checks.check(answers, stock)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant": {"scale": "sweep"}}, "quant: unknown key 'scale'; did you mean 'scales'?"),
        ({"quant": {"backend": "gpu"}}, "backend 'gpu' is unknown; known: auto, cpu, cpu_int16, reference"),
    ],
)
def test_bad_settings_stop_the_engine_with_a_clear_line(
    start: Start, cut: Path, settings: dict[str, object], words: str
) -> None:
    server = start(cut, *FLAG, settings=settings)
    with pytest.raises(FourfoldError, match=f"{server.engine} ended with status"), server:
        pass
    assert words in server.log.read_text()
