"""fourfold recipe new: configs of many architectures, none known by name, become recipes that check.

The configs are those of the shipped model cards under names that no engine and no card has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fourfold.common import cli
from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.check import checking, rules, snapshots
from fourfold.common.recipe.dayzero import writing
from fourfold.common.recipe.dayzero.compose import WORKLOADS, Composed, compose, name_of
from fourfold.common.recipe.dayzero.source import read_model
from fourfold.common.recipe.dayzero.vocabulary import unknown_traits
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.schema import ModelCard, Recipe
from fourfold.common.recipe.sizing.fit import cases_of, fit
from fourfold.common.recipe.sizing.traits import flat, read_traits

SHIPPED = Catalogue()
MODELS = (
    "deepseek-v3.2-nvfp4 deepseek-v4-flash deepseek-v4-pro deepseek-v4-pro-0813 deepseek-v4-pro-nvfp4 "
    "deepseek-v4.1-flash glm-5.3-nvfp4 gpt-oss-120b kimi-k3 minimax-m3-nvfp4 nemotron-3-ultra-nvfp4 "
    "qwen3.5-397b-nvfp4 qwen3.8-2.4t-nvfp4 smollm2-135m-instruct"
).split()
DENSE = {
    "architectures": ["UnseenForCausalLM"],
    "model_type": "unseen",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
MTP_LAYER = [
    f"model.layers.32.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "self_attn.q_proj", "mlp.up_proj")
]
MTP_LAYER += ["model.layers.32.shared_head.norm.weight", "model.layers.32.input_layernorm.weight"]


def _model(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder


def _index(names: list[str], size: int) -> dict[str, Any]:
    return {
        "model__safetensors__index__json": {
            "metadata": {"total_size": size},
            "weight_map": {name: "model-00001-of-00001.safetensors" for name in names},
        }
    }


def _compose(path: Path, hardware: str = "gb300-nvl72", workload: str = "chat", **more: Any) -> Composed:
    found = read_model(path)
    return compose(found, SHIPPED.hardware(hardware), workload, name_of(found, None), **more)


def _args(composed: Composed, engine: str) -> dict[str, Any]:
    return composed.recipe["engines"][engine]["args"]


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The cards' configs; the model is called unseen-N, its class and type are of no engine."""
    root = tmp_path_factory.mktemp("unseen")
    out = {}
    for i, name in enumerate(MODELS):
        config = SHIPPED.config(name)
        out[name] = _model(
            root / f"unseen-{i}", config | {"architectures": ["UnseenForCausalLM"], "model_type": "unseen"}
        )
    return out


@pytest.fixture(scope="module")
def chosen(unseen: dict[str, Path]) -> dict[tuple[str, str, str], Composed]:
    """What is chosen for each, on three machines and for three workloads."""
    out = {}
    for name, path in unseen.items():
        for hardware in ("gb300-nvl72", "gb200-nvl72", "h200"):
            for workload in WORKLOADS:
                out[name, hardware, workload] = _compose(path, hardware, workload)
    return out


def test_all_pass_the_rules(chosen: dict[tuple[str, str, str], Composed]) -> None:
    for (_, hardware, _), composed in chosen.items():
        recipe, card = Recipe.model_validate(composed.recipe), ModelCard.model_validate(composed.card)
        for engine, version in (("vllm", "0.32.0"), ("vllm", "0.33.0"), ("sglang", "0.5.23")):
            found = rules.findings(recipe, engine, version, card, SHIPPED.hardware(hardware))
            assert not [f for f in found if f.severity in ("error", "warning")], (recipe.id, engine, version)


def test_all_fit(chosen: dict[tuple[str, str, str], Composed]) -> None:
    """By fourfold recipe fit, on both engines, with as many requests as the recipe takes."""
    for (_, hardware, workload), composed in chosen.items():
        if workload == "chat" and hardware != "gb200-nvl72":
            recipe, card = Recipe.model_validate(composed.recipe), ModelCard.model_validate(composed.card)
            traits = read_traits(flat(SHIPPED.config(MODELS[int(composed.name.split("-")[1])])))
            for engine in recipe.engines:
                for case in cases_of(recipe, engine, card, traits, SHIPPED.hardware(hardware)):
                    assert fit(case).verdict == "fits", (composed.name, hardware, engine)
                    assert case.wanted >= WORKLOADS[workload].least


def test_all_pass_parsers_and_variables(unseen: dict[str, Path], tmp_path: Path) -> None:
    targets = snapshots.shipped()
    assert {(t.engine, t.version) for t in targets} >= {("vllm", "0.32.0"), ("vllm", "0.33.0"), ("sglang", "0.5.23")}
    for path in unseen.values():
        for hardware, workload in (("gb300-nvl72", "fixed"), ("h200", "agentic")):
            found = read_model(path)
            writing.write(tmp_path / "out", found, _compose(path, hardware, workload), True, [])
    catalogue = Catalogue([tmp_path / "out"])
    recipes = [catalogue.recipe(name) for name in catalogue.recipe_paths if name.startswith("unseen-")]
    assert len(recipes) == 2 * len(MODELS)
    checks = checking.check(recipes, catalogue, targets)
    assert len(checks) == 3 * len(recipes)
    low = [(c.recipe, c.label, c.findings) for c in checks if c.level < 2]
    assert not low


def test_layouts_are_those_that_are_published(chosen: dict[tuple[str, str, str], Composed]) -> None:
    """DeepSeek V4 Pro: GB300 holds it in one tray, GB200 in two (InferenceX); H200 in eight GPUs for few streams."""

    def layout(model: str, hardware: str, workload: str) -> dict[str, int]:
        sizes = chosen[model, hardware, workload].layout.parallel.model_dump()
        return {key: size for key, size in sizes.items() if size > 1}

    assert layout("deepseek-v4-pro", "gb300-nvl72", "fixed") == {"data": 4, "expert": 4}
    assert layout("deepseek-v4-pro", "gb300-nvl72", "chat") == {"tensor": 4, "expert": 4}
    assert layout("deepseek-v4-pro", "gb200-nvl72", "fixed") == {"data": 8, "expert": 8}
    assert layout("deepseek-v4-pro", "gb200-nvl72", "chat") == {"tensor": 8, "expert": 8}
    assert layout("deepseek-v4-pro", "h200", "chat") == {"tensor": 8, "expert": 8}
    assert layout("gpt-oss-120b", "gb300-nvl72", "chat") == {}
    assert layout("smollm2-135m-instruct", "h200", "fixed") == {}
    assert layout("kimi-k3", "gb300-nvl72", "agentic") == {"tensor": 8, "expert": 8}


def test_flags_follow_from_traits(chosen: dict[tuple[str, str, str], Composed]) -> None:
    pro = chosen["deepseek-v4-pro", "gb300-nvl72", "agentic"]
    vllm, sglang = _args(pro, "vllm"), _args(pro, "sglang")
    assert vllm["kv-cache-dtype"] == "fp8" and vllm["block-size"] == 256
    assert vllm["attention-config"] == {"indexer_kv_dtype": "mxfp4"} and sglang["page-size"] == 256
    assert "attention-config" not in _args(chosen["deepseek-v4-pro", "h200", "agentic"], "vllm")
    assert "block-size" not in _args(chosen["deepseek-v4.1-flash", "gb300-nvl72", "chat"], "vllm")
    sparse = _args(chosen["deepseek-v3.2-nvfp4", "gb300-nvl72", "fixed"], "sglang")
    assert sparse["kv-cache-dtype"] == "fp8_e4m3" and sparse["quantization"] == "modelopt_fp4"
    assert sparse["enable-dp-lm-head"] is True
    assert _args(chosen["nemotron-3-ultra-nvfp4", "h200", "chat"], "vllm")["mamba-ssm-cache-dtype"] == "float32"
    plain = chosen["smollm2-135m-instruct", "h200", "chat"]
    assert "kv-cache-dtype" not in _args(plain, "vllm") and "speculation" not in plain.recipe
    assert plain.layout.length == 8192
    dspark = chosen["deepseek-v4-pro-0813", "gb300-nvl72", "chat"]
    assert dspark.recipe["speculation"] == {"method": "dspark", "tokens": 5}
    assert _args(dspark, "vllm")["speculative-config"]["method"] == "dspark"
    assert _args(dspark, "sglang")["speculative-algorithm"] == "DSPARK"


@pytest.mark.parametrize("name", ["deepseek-v4-pro", "deepseek-v3.2-nvfp4", "minimax-m3-nvfp4"])
def test_names_change_nothing_but_the_drafter(
    name: str, chosen: dict[tuple[str, str, str], Composed], tmp_path: Path
) -> None:
    """The same config under its published class: only the engines' own MTP classes are known by it."""
    known = _compose(_model(tmp_path / "known", SHIPPED.config(name)))
    other = chosen[name, "gb300-nvl72", "chat"]
    assert known.layout.parallel == other.layout.parallel
    assert known.recipe["speculation"] == {"method": "mtp", "tokens": 2} and "speculation" not in other.recipe
    assert any("no engine has a class" in note for note in other.recipe["notes"])
    for engine in ("vllm", "sglang"):
        kept = {key: value for key, value in _args(known, engine).items() if not key.startswith("speculative")}
        assert set(kept) == set(_args(other, engine))


def test_mtp_of_a_known_layout_is_served_by_fourfold(tmp_path: Path) -> None:
    names = ["model.embed_tokens.weight", *MTP_LAYER]
    config = DENSE | {"num_nextn_predict_layers": 1}
    path = _model(tmp_path / "unseen", config, **_index(names, 16_500_000_000))
    composed = _compose(path, workload="agentic")
    assert composed.recipe["speculation"] == {"method": "mtp", "tokens": 3, "draft_model": "unseen-mtp"}
    assert _args(composed, "vllm")["speculative-config"]["model"] == "unseen-mtp"
    assert _args(composed, "sglang")["speculative-draft-model-path"] == "unseen-mtp"
    assert any("fourfold mtp extract unseen unseen-mtp" in note for note in composed.recipe["notes"])
    dropped = _compose(_model(tmp_path / "dropped", config, **_index(names[:1], 16_000_000_000)))
    assert "speculation" not in dropped.recipe
    assert any("names none of their tensors" in note for note in dropped.recipe["notes"])
    odd = _compose(_model(tmp_path / "odd", config, **_index(["mtp.0.strange.weight"], 16_000_000_000)))
    assert "speculation" not in odd.recipe and any("no known layout" in note for note in odd.recipe["notes"])


def test_drafts_are_a_number_that_vllm_takes(tmp_path: Path) -> None:
    for modules, tokens in ((1, 3), (2, 2), (3, 3), (7, 3)):
        config = DENSE | {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": modules}
        composed = _compose(_model(tmp_path / f"m{modules}", config), workload="agentic")
        assert composed.recipe["speculation"]["tokens"] == tokens


def test_the_index_decides_about_memory(tmp_path: Path) -> None:
    """A checkpoint of ten times what is understood needs more GPUs, and that is said."""
    small = _compose(_model(tmp_path / "small", DENSE, **_index(["a"], 16_100_000_000)))
    large = _compose(_model(tmp_path / "large", DENSE, **_index(["a"], 640_000_000_000)))
    assert small.layout.parallel.world == 1 < large.layout.parallel.world
    assert not any("Confirm the sizes" in note for note in small.confirm)
    assert any("640.00 GB" in note for note in large.confirm)
    assert large.card["published_bytes"] == 640_000_000_000


def test_quantisation_beside_the_config(tmp_path: Path) -> None:
    moe = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2048}
    quant = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    path = _model(tmp_path / "apart", DENSE | moe, hf_quant_config__json=quant)
    composed = _compose(path)
    assert composed.card["formats"]["experts"] == "nvfp4" and composed.card["formats"]["head"] == "bf16"
    assert _args(composed, "vllm")["kv-cache-dtype"] == "fp8"
    assert _args(composed, "sglang")["quantization"] == "modelopt_fp4"
    out = tmp_path / "out"
    files = writing.write(out, read_model(path), composed, False, [])
    assert json.loads(files["config"].read_text())["quantization_config"]["ignore"] == ["lm_head"]
    assert any("no FP4 arithmetic" in note for note in _compose(path, "h200").confirm)


def test_nvfp4_while_loading(tmp_path: Path) -> None:
    path = _model(
        tmp_path / "wide",
        DENSE
        | {"num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128},
    )
    plain, small = _compose(path), _compose(path, nvfp4=True)
    assert small.layout.parallel.world < plain.layout.parallel.world
    for engine in ("vllm", "sglang"):
        assert _args(small, engine)["quantization"] == "fourfold_nvfp4"
        assert "quantization" not in _args(plain, engine)
    with pytest.raises(FourfoldError, match="no 16-bit linear weights"):
        quantised = DENSE | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
        _compose(_model(tmp_path / "q", quantised), nvfp4=True)


def test_unknown_traits_are_named(tmp_path: Path) -> None:
    strange = {"zeta_experts": 16, "num_key_value_headz": 4, "off": False, "rope_theta": 1e6, "eos_token_id": 2}
    lines = unknown_traits(DENSE | strange)
    assert [line.split(":")[0] for line in lines] == ["zeta_experts", "num_key_value_headz"]
    assert "resembles num_key_value_heads" in lines[1]
    composed = _compose(_model(tmp_path / "m", DENSE | strange | {"layer_types": ["rwkv_attention"] * 32}))
    assert any("zeta_experts: 16" in note for note in composed.recipe["notes"])
    assert any("rwkv_attention" in note for note in composed.recipe["notes"])
    for name in MODELS:
        assert len(unknown_traits(read_model(SHIPPED.model_path(name).with_suffix(".json")).config)) <= 6, name


def test_a_processor(tmp_path: Path) -> None:
    composed = _compose(_model(tmp_path / "tiny", SHIPPED.config("smollm2-135m-instruct")), "cpu")
    assert _args(composed, "sglang")["device"] == "cpu"
    assert composed.recipe["engines"]["sglang"]["env"] == {"SGLANG_PLATFORM": "fourfold_cpu"}
    assert composed.layout.parallel.world == 1


def test_concurrency(tmp_path: Path) -> None:
    path = _model(tmp_path / "m", DENSE)
    assert _compose(path, concurrency=3).recipe["workload"]["concurrency"] == 3
    many = _compose(path, "h200", concurrency=2000)
    assert many.layout.parallel.world > 1 and many.layout.sequences >= 2000 // many.layout.parallel.data
    with pytest.raises(FourfoldError, match="no layout holds this model; .* requests of 2560 tokens; expected"):
        _compose(path, "h200", concurrency=1_000_000)


WRONG: list[tuple[str, str | dict[str, Any], str]] = [
    ("not JSON", "{", "not JSON"),
    ("a list", "[1]", "expected a JSON object"),
    ("deep", "[" * 100_000, "not JSON"),
    ("empty", "", "not JSON"),
    ("no size", {}, "hidden_size"),
    ("no heads", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 10}, "num_attention_heads"),
    ("text", DENSE | {"hidden_size": "big"}, "hidden_size"),
    ("negative", DENSE | {"num_hidden_layers": -1}, "num_hidden_layers"),
    ("vast", DENSE | {"num_hidden_layers": 10**9}, "expected at most 4096"),
    ("huge", DENSE | {"hidden_size": 10**40}, "hidden_size"),
    ("drafts", DENSE | {"num_nextn_predict_layers": 10**6}, "expected at most 64"),
    ("format", DENSE | {"torch_dtype": "float13"}, "float13"),
    ("a draft", DENSE | {"fourfold_mtp": {"family": "deepseek_v3"}}, "a draft directory"),
    ("index", DENSE | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP3"}}, "NVFP3"),
]


@pytest.mark.parametrize(("config", "said"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_configs(
    config: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    code, out, err = _run(monkeypatch, capsys, str(folder), "--hardware", "h200", "--out", str(tmp_path / "out"))
    assert code == 2 and not out and err.startswith("fourfold: ") and said in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def _wrong_values() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("deepseek-v4-pro-0813", "nemotron-3-ultra-nvfp4"):
        config = SHIPPED.config(name)
        for key in config:
            for value in ("x", -1, [["a"]], {"a": [1]}, 10**30):
                yield f"{key}={value!r}", config | {key: value}


def test_any_value_is_taken_or_refused_in_words(tmp_path: Path) -> None:
    tried = 0
    for what, config in _wrong_values():
        try:
            composed = _compose(_model(tmp_path / "m", config))
        except FourfoldError as error:
            assert "\n" not in str(error), what
        else:
            Recipe.model_validate(composed.recipe), ModelCard.model_validate(composed.card)
        tried += 1
    assert tried > 400


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    config = DENSE | {"architectures": ["\x1b[2J$(id)"], "\x1b[31mkey": "\x07", "x'; id #": 1, "zeta\nid": 2}
    names = ["mtp.0.\x1b[2Jstrange.weight"]
    path = _model(tmp_path / "m", config | {"num_nextn_predict_layers": 1}, **_index(names, 16_000_000_000))
    files = writing.write(tmp_path / "out", read_model(path), _compose(path), False, [])
    text = files["recipe"].read_text() + files["card"].read_text()
    assert "\x1b" not in text and "\x07" not in text


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fourfold", "recipe", "new", *given])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_files_are_kept_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = _model(tmp_path / "m", DENSE), tmp_path / "out"
    given = (str(model), "--hardware", "h200", "--out", str(out))
    code, text, _ = _run(monkeypatch, capsys, *given)
    assert code == 0 and "Confirm the memory" in text and "Next: fourfold recipe show" in text
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert sorted(str(p.relative_to(out)) for p in before) == ["m/h200-chat.yaml", "models/m.json", "models/m.yaml"]
    (model / "config.json").write_text(json.dumps(DENSE | {"num_hidden_layers": 16}))
    code, _, err = _run(monkeypatch, capsys, *given)
    assert code == 2 and "there already; --force replaces" in err
    assert all(path.read_bytes() == data for path, data in before.items())
    code, text, _ = _run(monkeypatch, capsys, *given, "--force", "--json")
    assert code == 0 and json.loads(text)["id"] == "m/h200-chat"
    assert (out / "models" / "m.json").read_bytes() == (model / "config.json").read_bytes()
    assert Catalogue([out]).recipe("m/h200-chat").model == "m"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that fails midway leaves what was there, and nothing else."""
    path, out = _model(tmp_path / "m", DENSE), tmp_path / "out"
    writing.write(out, read_model(path), _compose(path), False, [])
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (path / "config.json").write_text(json.dumps(DENSE | {"num_hidden_layers": 16}))
    replaced = os.replace

    def failing(source: Any, target: Any) -> None:
        if str(target).endswith("h200-chat.yaml") or str(target).endswith("gb300-nvl72-chat.yaml"):
            raise OSError(28, "No space left on device")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(FourfoldError, match="No space left"):
        writing.write(out, read_model(path), _compose(path), True, [])
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--hardware", "gb300-nvl27"], "did you mean gb300-nvl72?"),
        (["--hardware", "../gb300"], "no file hardware/"),
        (["--hardware", "h200", "--workload", "chatt"], "did you mean chat?"),
        (["--hardware", "h200", "--name", "../x"], "expected lower-case letters"),
        (["--hardware", "h200", "--name", "models"], "no folder's name"),
        (["--hardware", "h200", "--repo", "../x"], "repo"),
        (["--hardware", "h200", "--repo", "-x/y"], "repo"),
    ],
)
def test_wrong_options(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _model(tmp_path / "m", DENSE)
    code, _, err = _run(monkeypatch, capsys, str(model), "--out", str(tmp_path / "out"), *given)
    assert code == 2 and said in err and not (tmp_path / "out").exists()
    code, _, err = _run(monkeypatch, capsys, str(tmp_path / "nowhere"), "--hardware", "h200")
    assert code == 2 and "no such file or directory" in err


def test_in_seconds_without_network_engine_or_torch(tmp_path: Path) -> None:
    """A whole run in a process of its own, in which sockets and torch are not to be had."""
    model = _model(tmp_path / "new-model", SHIPPED.config("deepseek-v4-pro"))
    script = (
        "import socket, sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'vllm', 'sglang', 'transformers'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "def refuse(*args, **kwargs): raise OSError('no network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from fourfold.common import cli\n"
        f"sys.argv = ['fourfold', 'recipe', 'new', {str(model)!r}, '--hardware', 'gb300', '--out', "
        f"{str(tmp_path / 'out')!r}]\n"
        "cli.main()\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 60
    assert Catalogue([tmp_path / "out"]).recipe("new-model/gb300-nvl72-chat").engines.keys() == {"vllm", "sglang"}
