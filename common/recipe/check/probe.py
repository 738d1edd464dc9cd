"""Ask a real engine, in its own interpreter: ``python probe.py REQUEST ANSWERS``.

Runs as a file, needs the standard library and the engine, and nothing of fourfold but the engine's adapter
(``recipe_probe.py`` of ``vllm_ext`` or ``sglang_ext``), which is run as a file, too. It imports the engine once, then
examines each case in a process of its own (forked), so that a case's environment, crash or endless loop concerns that
case alone. Requests are one JSON object, answers are lines of JSON, appended as they are ready: ``ready`` (with the
engine's version), ``facts`` (options and variables), and one for each case. The engine's output goes wherever this
process's does. Contract of both: `asking`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import re
import select
import signal
import sys
import time
import traceback
from enum import Enum
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MOST_REFUSALS = 20
# What says that the simulation fell short, and nothing about the configuration.
UNABLE = re.compile(
    r"not compiled with CUDA|No CUDA GPUs|NVIDIA driver|NVML|libcuda|"
    r"couldn't connect to|Can't load|offline mode|LocalEntryNotFound|is not a local folder|No module named|"
    r"failed to be inspected|cannot import name|has no attribute|Error raised in subprocess|No accelerator",
    re.I,
)


class Refused(Exception):
    """The engine's parser refuses the arguments; the message is the engine's."""


def load(path: Path) -> Any:
    """The module in a file, by path: the interpreter here need not have fourfold."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def one_line(error: BaseException | str, limit: int = 600) -> str:
    """Text for a finding."""
    text = error if isinstance(error, str) else (str(error) or type(error).__name__)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def culprits(message: str, names: list[str]) -> list[str]:
    """The options among ``names`` that a parser's message blames."""
    ambiguous = re.match(r"ambiguous option: (--[\w.-]+)", message)
    if ambiguous:
        text = ambiguous[1]
    elif message.startswith("argument "):
        text = message[len("argument ") :].split(": ", 1)[0]
    else:
        text = message
    given = set(re.findall(r"--([\w.-]+)", text))
    written = {name: name.replace("_", "-") for name in names}  # vLLM's parser says dashes
    return [n for n, dashed in written.items() if {n, dashed, f"no-{n}", f"no-{dashed}"} & given]


def parsed(adapter: Any, model: str, options: list[list[Any]]) -> tuple[Any, list[dict[str, Any]]]:
    """What the parser makes of ``options`` ([name, arguments]), and all that it refuses, one option at a time."""
    refusals: list[dict[str, Any]] = []
    left = list(options)
    for _ in range(MOST_REFUSALS):
        try:
            return adapter.parse(model, [argument for _, arguments in left for argument in arguments]), refusals
        except Refused as error:
            blamed = culprits(str(error), [name for name, _ in left])
            refusals += [{"option": name, "message": one_line(error)} for name in blamed or [None]]
            if not blamed:
                break
            left = [pair for pair in left if pair[0] not in blamed]
    return None, refusals


def plain(value: Any) -> Any:
    """A value as JSON can say it: enums by name, dtypes by theirs, records as mappings."""
    if isinstance(value, Enum):
        return value.name.lower()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    fields = getattr(type(value), "__dataclass_fields__", None) or getattr(type(value), "__struct_fields__", None)
    if fields:
        return {name: plain(getattr(value, name, None)) for name in fields if not name.startswith("_")}
    return str(value).removeprefix("torch.")


def same(wanted: Any, got: Any, raw: Any = None) -> bool:
    """Whether ``got`` is what was asked for.

    A mapping asks for its keys only, a list of words for these words (engines add their own); ``auto`` and None ask
    for nothing. ``raw`` is the value that `plain` made ``got`` of: an enum may be asked for by its value.
    """
    if wanted is None or isinstance(wanted, str) and wanted.lower() in ("auto", ""):
        return True
    if isinstance(wanted, dict) and isinstance(got, dict):
        return all(same(value, got.get(key), getattr(raw, key, None)) for key, value in wanted.items())
    if isinstance(wanted, (list, tuple)) and isinstance(got, (list, tuple)):
        if wanted and all(isinstance(word, str) for word in wanted):
            return set(wanted) <= set(got)
        return len(wanted) == len(got) and all(map(same, wanted, got))
    if isinstance(wanted, str) and isinstance(got, str):
        return wanted.lower().replace("-", "_") == got.lower().replace("-", "_")
    return wanted == got or getattr(raw, "value", got) == wanted


def abbreviated(parser: Any, names: list[str]) -> dict[str, str]:
    """Options that the parser takes only as the beginning of another one's name, which it is."""
    known, out = parser._option_string_actions, {}
    for name in names:
        if f"--{name}" not in known:
            longer = [option for option in known if option.startswith(f"--{name}")]
            out |= {name: longer[0].lstrip("-")} if len(longer) == 1 else {}
    return out


def options_of(parser: Any) -> dict[str, dict[str, Any]]:
    """Every long option of a parser: what it takes (``none``, ``one``, ``many``, ``optional``), kind and choices."""
    out: dict[str, dict[str, Any]] = {}
    for option, action in sorted(parser._option_string_actions.items()):
        if not option.startswith("--") or option == "--help":
            continue
        takes = "none" if action.nargs == 0 else {None: "one", "?": "optional"}.get(action.nargs, "many")
        fact: dict[str, Any] = {"takes": takes}
        if takes != "none":
            fact["kind"] = kind_of(action.type)
        if action.choices:
            fact["choices"] = sorted(str(plain(choice)) for choice in action.choices)
        out[option.lstrip("-")] = fact
    return out


def kind_of(convert: Any) -> str:
    """``text``, ``float``, ``size`` (such as 8k), ``int``, ``json`` or ``other``: told from what a converter takes."""
    for kind, sample in (("text", "a b"), ("float", "1.5"), ("size", "8k"), ("int", "7"), ("json", "{}")):
        try:
            if convert is not None:
                convert(sample)
        except BaseException:  # noqa: BLE001, S112 - any refusal is an answer
            continue
        return kind
    return "other"


def names_read(folder: Path, prefixes: str = "") -> set[str]:
    """Environment variables that the sources below ``folder`` read or set, and quoted names with the prefixes."""
    call = r"(?:environ(?:\.get|\.setdefault|\.pop)?\s*[\[(]|getenv\(|env_var\()\s*[\"']([A-Z][A-Z0-9_]+)[\"']"
    pattern = re.compile(call + (rf"|[\"']((?:{prefixes})[A-Z0-9_]+)[\"']" if prefixes else ""))
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        text = path.read_text(errors="ignore")
        found.update(
            name for groups in pattern.findall(text) for name in ([groups] if isinstance(groups, str) else groups)
        )
    return found - {""}


def examine(adapter: Any, case: dict[str, Any]) -> dict[str, Any]:
    """One case: parse, then resolve."""
    os.environ.update(case["env"])
    began = time.monotonic()
    arguments, refusals = parsed(adapter, case["model"], case["options"])
    answer: dict[str, Any] = {
        "refused": refusals,
        "abbreviated": abbreviated(adapter.parser, [name for name, _ in case["options"]]),
    }
    if arguments is not None and not refusals and case["resolve"]:
        answer["resolution"] = resolution(adapter, arguments, case)
    answer["seconds"] = round(time.monotonic() - began, 2)
    return answer


def resolution(adapter: Any, arguments: Any, case: dict[str, Any]) -> dict[str, Any]:
    """``resolved`` with what changed, ``refused``, or ``unable``: the simulation fell short."""
    before = set(sys.modules)
    try:
        requested, resolved, others = adapter.resolve(arguments, case)
    except BaseException as error:  # engines end with SystemExit, too
        traceback.print_exc()
        able = not isinstance(error, (ImportError, AttributeError, NameError, OSError)) and not UNABLE.search(
            str(error)
        )
        text = one_line(error)
        return {"state": "refused" if able else "unable", "message": f"{type(error).__name__}: {text}"}
    changed = []
    for name, wanted in requested.items():
        if name in resolved and not same(plain(wanted), plain(resolved[name]), resolved[name]):
            asked, got, raw = plain(wanted), plain(resolved[name]), resolved[name]
            if isinstance(asked, dict) and isinstance(got, dict):
                asked = {k: v for k, v in asked.items() if not same(v, got.get(k), getattr(raw, k, None))}
                got = {k: got.get(k) for k in asked}
            changed.append({"option": name, "requested": asked, "resolved": got})
    return {
        "state": "resolved",
        "changed": changed,
        "resolved": {name: plain(value) for name, value in {**others, **resolved}.items()},
        "modules": sorted(set(sys.modules) - before),
    }


def forked(adapter: Any, case: dict[str, Any], timeout: float) -> dict[str, Any]:
    """`examine` in a child, ended after ``timeout`` seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            os.setpgid(0, 0)
            with os.fdopen(write, "wb") as pipe:
                pipe.write(pickle.dumps(json.loads(json.dumps(examine(adapter, case)))))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    data, end = b"", time.monotonic() + timeout
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, end - time.monotonic()))
        piece = os.read(read, 1 << 16) if ready else None
        if not piece:
            break
        data += piece
    os.close(read)
    if piece is None:
        _end(child)
        os.waitpid(child, 0)
        return {"failed": f"no answer after {timeout:.0f} s"}
    _, status = os.waitpid(child, 0)
    _end(child)
    if os.WIFSIGNALED(status):
        return {"failed": f"the engine crashed: {signal.Signals(os.WTERMSIG(status)).name}"}
    if not data:
        return {"failed": f"the engine ended with status {os.WEXITSTATUS(status)}"}
    return pickle.loads(data)  # written by our own child


def _end(child: int) -> None:
    """Kill what is left of a case's process group."""
    try:
        os.killpg(child, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def warm(names: list[str]) -> None:
    """Import what a case needed, so that the cases after it find it loaded."""
    for name in names:
        if name not in sys.modules and not name.startswith("__"):
            try:
                importlib.import_module(name)
            except BaseException:  # noqa: BLE001 - only an optimisation
                continue


def main(request_path: str, answers_path: str) -> int:
    """Answer a request. Returns the exit status."""
    request = json.loads(Path(request_path).read_text())
    with open(answers_path, "a", buffering=1) as answers:

        def say(answer: dict[str, Any]) -> None:
            answers.write(json.dumps(answer) + "\n")

        try:
            adapter = load(HERE.parents[2] / f"{request['engine']}_ext" / "recipe_probe.py")
            say({"ready": adapter.start(request, load, Refused)})
            if request["facts"] is not None:
                say({"facts": adapter.facts(request["facts"])})
        except BaseException as error:
            traceback.print_exc()
            say({"fatal": f"{type(error).__name__}: {one_line(error)}"})
            return 1
        for case in request["cases"]:
            answer = forked(adapter, case, request["timeout"])
            warm(answer.get("resolution", {}).pop("modules", []))
            say({"id": case["id"], **answer})
    return 0


if __name__ == "__main__":
    if sys.path and Path(sys.path[0] or ".").resolve() == HERE:
        del sys.path[0]  # the files here must not shadow the engine's modules
    sys.modules["probe"] = sys.modules["__main__"]
    code = main(*sys.argv[1:3])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # engines leave threads behind
