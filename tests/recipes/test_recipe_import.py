"""Importing other projects' recipes: samples of each format, written for these tests, and hostile files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fourfold.common.cli import app
from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.importing.collection import Choice, import_file, import_folder, write
from fourfold.common.recipe.importing.reading import read
from fourfold.common.recipe.importing.result import Imported
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.schema import Parallel

SAMPLES = Path(__file__).parent / "samples"
CATALOGUE = Catalogue()


def only(name: str) -> Imported:
    (item,) = import_file(SAMPLES / name, CATALOGUE)
    return item


def said(item: Imported, text: str) -> bool:
    return any(text in line for line in item.unknown)


def old_names(item: Imported) -> dict[str, set[str]]:
    out: dict[str, set[str]] = {}
    for role, rename in item.rot:
        out.setdefault(rename.old, set()).add(role)
    return out


def test_srt_sglang_apart(tmp_path: Path) -> None:
    item = only("srt-sglang.yaml")
    assert item.refused == ["sglang 0.5.23"] and item.left == [] and item.repaired and item.loads
    (path,) = write([item], tmp_path)
    recipe = CATALOGUE.recipe(path)
    assert (recipe.id, recipe.model, recipe.hardware) == (
        "deepseek-v4-pro/srt-sglang",
        "deepseek-v4-pro",
        "gb300-nvl72",
    )
    plan = recipe.engines["sglang"]
    prefill, decode = plan.roles["prefill"], plan.roles["decode"]
    assert (prefill.replicas, prefill.parallel) == (2, Parallel(data=4, expert=4))
    assert (decode.replicas, decode.parallel) == (1, Parallel(data=16, expert=16))
    assert plan.args == {
        "served-model-name": "deepseek-ai/DeepSeek-V4-Pro",
        "moe-a2a-backend": "megamoe",
        "enable-w4a4-mxfp4-megamoe": True,
    }
    assert prefill.args == {"cuda-graph-max-bs-decode": 512, "chunked-prefill-size": 32768}
    assert decode.args["cuda-graph-max-bs-decode"] == 128 and decode.args["max-running-requests"] == 2048
    assert plan.env == {"MC_FORCE_MNNVL": "1", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    assert not prefill.env and not decode.env
    assert recipe.speculation and (recipe.speculation.method, recipe.speculation.tokens) == ("mtp", 3)
    assert (recipe.workload.input_tokens, recipe.workload.concurrency) == (8192, 2048)
    assert plan.router and plan.router.kind == "dynamo" and plan.router.args == {"router-mode": "kv"}
    found = old_names(item)
    assert found["cuda-graph-max-bs"] == {"prefill", "decode"} and found["SGLANG_ENABLE_SPEC_V2"] == {"decode"}
    assert found["prefill-round-robin-balance"] == {"prefill"} and "enable-dp-attention" in found
    for line in ("dynamo: ", "DYN_LOG", "CACHE_DIR=$SCRATCH", "PYTHONNOUSERSITE", "req_rate", "model-path", "image: ",
                 "concurrencies: 512x2048"):  # fmt: skip
        assert said(item, line), line
    text = path.read_text()
    assert "Not carried over: dynamo" in text and "Renamed in prefill, decode: cuda-graph-max-bs" in text


def test_srt_vllm_together() -> None:
    item = only("srt-vllm.yaml")
    assert item.refused == ["vllm 0.32.0", "vllm 0.33.0"] and item.left == [] and item.repaired and item.loads
    plan = item.data["engines"]["vllm"]
    role = plan["roles"]["aggregated"]
    assert role["replicas"] == 3 and role["parallel"] == {"data": 8, "expert": 8}
    assert role["args"] == {
        "attention-config": {"indexer_kv_dtype": "mxfp4"},
        "moe-backend": "deep_gemm_mega_moe",
        "kv-cache-dtype": "fp8",
        "speculative-config": {"method": "mtp", "num_speculative_tokens": 2},
        "enable-prefix-caching": True,
        "async-scheduling": False,
        "trust-remote-code": True,
        "prefix-cache-retention-interval": 32768,
    }
    assert role["env"] == {"VLLM_ENGINE_READY_TIMEOUT_S": "3600"}
    assert said(item, "data-parallel-hybrid-lb")
    assert {rename.effect for _, rename in item.rot} == {"refused", "ignored"}


def test_srt_variants() -> None:
    items = {item.id.rpartition("/")[2]: item for item in import_file(SAMPLES / "srt-variants.yaml", CATALOGUE)}
    assert set(items) == {"srt-variants-small", "srt-variants-wide-0", "srt-variants-wide-1"}
    decode = {name: item.data["engines"]["sglang"]["roles"]["decode"] for name, item in items.items()}
    assert decode["srt-variants-small"]["args"] == {"cuda-graph-max-bs-decode": 8}
    assert decode["srt-variants-wide-1"]["parallel"] == {"tensor": 16, "data": 2}
    assert decode["srt-variants-wide-0"]["args"]["dsa-decode-backend"] == "trtllm"
    item = items["srt-variants-wide-1"]
    assert (
        item.data["workload"]["kind"] == "agentic" and said(item, "workload: no lengths") and said(item, "bash run.sh")
    )
    assert not item.loads and said(item, "models/some-model-fp8.yaml")


def test_vllm_project() -> None:
    items = {item.id.rpartition("/")[2]: item for item in import_file(SAMPLES / "vllm-project.yaml", CATALOGUE)}
    assert set(items) == {
        f"gb300-{name}" for name in ("single-node-tp", "single-node-tep", "multi-node-dep", "pd-cluster")
    }
    tep = items["gb300-single-node-tep"].data["engines"]["vllm"]["roles"]["aggregated"]
    assert tep["parallel"] == {"tensor": 4, "expert": 4}
    assert tep["args"]["moe-backend"] == "deep_gemm_mega_moe" and tep["args"]["block-size"] == 256
    assert tep["args"]["attention-config"] == {"indexer_kv_dtype": "mxfp4"} and "env" not in tep
    tp = items["gb300-single-node-tp"]
    args = tp.data["engines"]["vllm"]["roles"]["aggregated"]["args"]
    assert "moe-backend" not in args and args["max-model-len"] == "auto" and said(tp, "in one word")
    apart = items["gb300-pd-cluster"]
    plan = apart.data["engines"]["vllm"]
    assert [role["parallel"]["data"] for role in plan["roles"].values()] == [4, 8]
    assert [role["args"]["kv-transfer-config"]["kv_role"] for role in plan["roles"].values()] == [
        "kv_producer",
        "kv_consumer",
    ]
    assert plan["env"] == {"NCCL_MNNVL_ENABLE": "1"} and said(apart, "$PREFILL_NODE_1")
    assert all(item.loads for item in items.values())
    assert said(tp, "features.spec_decoding: opt-in") and said(tp, "variants.nvfp4")
    choice = Choice("h200", "nvfp4", ["spec_decoding"])
    other = import_file(SAMPLES / "vllm-project.yaml", CATALOGUE, choice)[0]
    args = other.data["engines"]["vllm"]["roles"]["aggregated"]["args"]
    assert other.data["model"] == "deepseek-v4-pro-nvfp4" and other.data["hardware"] == "h200"
    assert args["max-model-len"] == 200000 and args["speculative-config"]["num_speculative_tokens"] == 2


def test_folder_counts_and_command(tmp_path: Path) -> None:
    found = import_folder(SAMPLES, CATALOGUE)
    counts = found.counts()
    assert found.files == 4 and not found.failed and not found.others
    assert counts["sglang"]["recipes"] == counts["sglang"]["refused"] == counts["sglang"]["repaired"] == 4
    assert counts["vllm"]["recipes"] == 5 and counts["vllm"]["repaired"] == 5
    runner = CliRunner()
    out = runner.invoke(app, ["recipe", "import", str(SAMPLES / "srt-vllm.yaml"), "--out", str(tmp_path)])
    assert (
        out.exit_code == 0
        and "1 recipes with 4 old settings: repaired 1, left 0" in out.output
        and "deep_gemm_mega_moe" in out.output
    )
    assert (tmp_path / "deepseek-v4-pro" / "srt-vllm.yaml").is_file()
    again = runner.invoke(app, ["recipe", "import", str(SAMPLES / "srt-vllm.yaml"), "--out", str(tmp_path)])
    assert isinstance(again.exception, FourfoldError) and "is there already" in str(again.exception)
    listed = runner.invoke(app, ["recipe", "import", str(SAMPLES), "--json"])
    assert listed.exit_code == 0
    data = json.loads(listed.output)
    assert data["files"] == 4 and len(data["recipes"]) == 9 and data["counts"] == counts
    assert data["recipes"][0]["rot"][0].keys() >= {"role", "kind", "old", "new", "value", "effect", "why", "source"}


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join(['*' + old] * 40)}]}}\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
HEAD = "model: {path: m}\nresources: {gpu_type: gb300, agg_workers: %s}\nbackend: {vllm_config: {aggregated: %s}}\n"
BASE = "base: {model: {}, resources: {}, backend: {}}\n"
MODEL = "model: {model_id: a/b}\n"
HOSTILE: list[tuple[str, str]] = [
    ("", "expected a mapping"),
    ("- 1\n", "expected a mapping"),
    ("a: [1\n", "line 2"),
    ("a: !!python/object/apply:os.system ['touch pwned']\n", "could not determine a constructor"),
    ("a: !ENV x\n", "could not determine a constructor"),
    ("? {a: 1}\n: 2\n", "a key that is not text"),
    ("a: &a [*a]\n", "recursive"),
    (LAUGHS, "once its aliases are written out"),
    ("[" * 3000, "not YAML"),
    ("a: 1\n" + "#" * (300 << 10), "larger than"),
    ("name: x\n", "neither srt-slurm"),
    ("model: 1\nresources: {}\nbackend: {vllm_config: {}}\n", "model: 1; expected a mapping"),
    ("model: {}\nresources: {}\nbackend: {type: trtllm}\n", "type 'trtllm'; expected vllm or sglang"),
    (HEAD % ("many", "{}"), "agg_workers: 'many'; expected a whole number"),
    (HEAD % (1, "[1]"), "aggregated: [1]; expected a mapping"),
    (BASE + "zip_override_x: {a: [1, 2], b: [1, 2, 3]}\n", "lists of [2, 3] values"),
    (BASE + f"zip_override_x: {{a: {list(range(99))}}}\n", "99 variants"),
    (MODEL + "variants: {x: {}}\ncompatible_strategies: [single_node_tp]\n", "no 'default'; there are x"),
    ("model: {model_id: a/b}\nvariants: {default: {}}\ncompatible_strategies: [magic]\n", "['magic']; expected one of"),
    ("model: {model_id: a/b, base_args: --x}\nvariants: {default: {}}\ncompatible_strategies: [single_node_tp]\n",
     "expected a list of arguments"),
    (MODEL + "variants: {default: {}}\ncompatible_strategies: [single_node_tp]\nomni: {}\n", "vllm-omni"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), HOSTILE)
def test_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    with pytest.raises(FourfoldError) as error:
        import_file(path, CATALOGUE)
    message = str(error.value)
    assert says in message and str(path) in message and "\n" not in message and len(message) < 600
    assert list(tmp_path.iterdir()) == [path]


def test_merge_keys_do_not_multiply(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(MERGES)
    with pytest.raises(FourfoldError, match="multiply|neither srt-slurm"):
        import_file(path, CATALOGUE)


def test_merges_and_repeats(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("d: &d {k: 1, l: 1}\nm: {<<: *d, k: 2}\nn: 1\nn: 2\n")
    assert read(path) == ({"d": {"k": 1, "l": 1}, "m": {"k": 2, "l": 1}, "n": 2}, ["line 4: n"])


def values(data: Any) -> list[str]:
    """All text of a tree."""
    if isinstance(data, dict):
        return [text for item in data.values() for text in values(item)]
    return [text for item in data for text in values(item)] if isinstance(data, list) else [str(data)]


def test_hostile_values_stay_data(tmp_path: Path) -> None:
    """Shell text is one argument or left out; names cannot leave the folder; what runs programs is left out."""
    path = tmp_path / "x.yaml"
    path.write_text(
        'model: {path: "../../etc/$(touch pwned)"}\n'
        "resources: {gpu_type: '../gb300', gpus_per_node: 4}\n"
        "backend:\n"
        "  aggregated_environment: {LD_PRELOAD: /tmp/evil.so, 'A B': '1', OK: '`id`', X: $(id), PATH: /tmp}\n"
        "  vllm_config: {aggregated: {dtype: '; rm -rf /', '--x y': 1, a: '--config=/tmp/x',"
        ' config: /tmp/y, b: "1\\n2", tensor-parallel-size: huge, seed: .inf, n: 99999999999999999999999}}\n'
    )
    (item,) = import_file(path, CATALOGUE)
    role = item.data["engines"]["vllm"]["roles"]["aggregated"]
    assert role == {"args": {"dtype": "; rm -rf /"}, "env": {"OK": "`id`"}}
    for name in ("LD_PRELOAD", "A B", "X=$(id)", "PATH", "x y", "--config", "config", "b", "huge", "seed", "n"):
        assert any(name in line for line in item.unknown), name
    (out,) = write([item], tmp_path / "out")
    assert out.resolve().is_relative_to((tmp_path / "out").resolve()) and ".." not in item.id
    assert not any("\n" in text for text in values(item.data))


def test_nothing_is_written_where_a_file_is(tmp_path: Path) -> None:
    items = import_file(SAMPLES / "srt-variants.yaml", CATALOGUE)
    taken = tmp_path / f"{items[-1].id}.yaml"
    taken.parent.mkdir(parents=True)
    taken.write_text("mine")
    with pytest.raises(FourfoldError, match="is there already"):
        write(items, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [taken] and taken.read_text() == "mine"
    assert len(write(items, tmp_path, overwrite=True)) == len(items)
