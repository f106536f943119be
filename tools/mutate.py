"""Mutation testing: break one operator of one module at a time and see whether a test notices.

    pip install cosmic-ray==8.7.0 coverage==7.17.4       # not among the dev extras: nothing else needs them
    python tools/mutate.py survey                        # which test runs which line (minutes; again for changed files)
    python tools/mutate.py run qdense/ops/dropout.py     # every mutant of a module
    python tools/mutate.py run --sample 30 qdense/methods/*.py
    python tools/mutate.py run --again qdense/ops/*.py   # the survivors once more, after a test was written (--by NAME: by it)
    python tools/mutate.py report

cosmic-ray's operators make the mutants; this file runs them. Importing torch, transformers and peft takes longer than most
tests, so they are imported once, without any torch operation and without qdense; each mutant is a fork that sees the mutated
source through an import hook (nothing on the disk changes) and runs the tests that execute the mutated statement, the quick
before the slow and those of its own package before others, up to `--budget` seconds of them. A test that runs qdense in a
process of its own does not see the mutant.

Left out, as no test should depend on them: annotations, what is spelled in an error or a notice, `if TYPE_CHECKING`; and as
they die too easily or cannot: `x + y` as bit operations (TypeError for floats), `==` as `is`, `-x` as `+x` or `~x`.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import json
import linecache
import os
import pkgutil
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".cache" / "mutation"
PRELOADED = (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "peft", "bitsandbytes", "accelerate", "datasets",
    "safetensors.torch", "pydantic", "rich.console", "liger_kernel.transformers", "lm_eval", "matplotlib.pyplot", "gguf",
    "openai", "pytest", "coverage",
)  # fmt: skip
TESTS = (
    "ops/*.py", "training/*.py", "methods/*.py", "tuners/*.py", "modeling/*.py", "planning/*.py", "comparison/*.py",
    "analysis/*.py", "benchmarks/test_[e-g]*.py", "benchmarks/test_scoring.py", "test_runs.py",
)  # fmt: skip
_FAMILIES = (
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}, {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"}, {"Is", "IsNot"},
)  # fmt: skip
_COMPOUND = ("suite", "file_input", "if_stmt", "while_stmt", "for_stmt", "try_stmt", "with_stmt", "funcdef", "classdef")
_EXPRESSIONS = ("arith_expr", "term", "power", "expr", "and_expr", "xor_expr", "shift_expr")


@dataclass(frozen=True)
class Mutant:
    module: str  # qdense/ops/dropout.py
    operator: str
    occurrence: int
    line: int
    statement: tuple[int, int]  # its first and last line
    digest: str  # of the module's source

    @property
    def key(self) -> tuple[str, ...]:
        return self.module, self.digest, self.operator, str(self.occurrence)

    def source(self) -> str:
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        return mutate_code((ROOT / self.module).read_text(), get_operator(f"core/{self.operator}")(), self.occurrence)


# --- making mutants -------------------------------------------------------------------------------------------------------


def mutants(module: str) -> list[Mutant]:
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    source, found = (ROOT / module).read_text(), []
    digest, nodes = hashlib.sha256(source.encode()).hexdigest()[:8], list(ast_nodes(get_ast(source)))
    for name in filter(_is_used, plugins.operator_names()):
        operator_class: Any = plugins.get_operator(name)
        if operator_class.arguments():
            continue
        operator = operator_class()
        positions = [(node, at[0][0]) for node in nodes for at in operator.mutation_positions(node)]
        for occurrence, (node, line) in enumerate(positions):
            if not _is_left_out(node):
                found.append(Mutant(module, name.removeprefix("core/"), occurrence, line, _statement(node), digest))
    return found


def _is_used(operator: str) -> bool:
    if "UnaryOperator" in operator:
        return "_Delete_" in operator
    if match := re.search(r"Replace(?:Binary|Comparison)Operator_(\w+)_(\w+)", operator):
        return any({*match.groups()} <= family for family in _FAMILIES)
    return True


def _is_left_out(node: Any) -> bool:
    if node.type == "except_clause" and "." in node.get_code():  # its operator knows plain names only
        return True
    if node.type == "operator" and node.parent.type not in _EXPRESSIONS:  # the * of f(*, x): no operator, a SyntaxError
        return True
    while (parent := node.parent) is not None:
        siblings = parent.children
        place = next(i for i, child in enumerate(siblings) if child is node)
        before = siblings[place - 1].get_code().strip() if place else ""
        if (parent.type in ("annassign", "tfpdef") and before == ":") or (parent.type == "funcdef" and before == "->"):
            return True
        if parent.type == "if_stmt" and siblings[1].get_code().strip() == "TYPE_CHECKING":
            return True
        if node.type == "fstring" and _is_message(node):
            return True
        node = parent
    return False


def _is_message(node: Any) -> bool:
    while (node := node.parent) is not None:
        if node.type in ("raise_stmt", "assert_stmt"):
            return True
        if node.type in ("atom_expr", "power") and re.match(r"\s*(\w+Error|Notice|print)\b", node.get_code()):
            return True
    return False


def _statement(node: Any) -> tuple[int, int]:
    while node.parent is not None and node.parent.type not in _COMPOUND:
        node = node.parent
    if node.type in _COMPOUND:  # an operator on the compound statement itself changes its head
        return node.start_pos[0], node.start_pos[0]
    return node.start_pos[0], node.end_pos[0]


# --- which test runs which line -------------------------------------------------------------------------------------------


def survey(files: Sequence[str]) -> None:
    (WORK / "survey").mkdir(parents=True, exist_ok=True)
    _forked(_survey_imports, limit=600)
    for file in files:
        started = time.monotonic()
        code = _forked(partial(_survey, file), limit=1800)
        print(f"{file}: exit {code}, {time.monotonic() - started:.0f} s", flush=True)


def _survey_imports() -> int:
    """Lines that run while qdense is imported: what they make is seen by tests that do not run them."""
    import coverage

    measured = coverage.Coverage(data_file=None, source=["qdense"], config_file=False)
    measured.start()
    for module in pkgutil.walk_packages([str(ROOT / "qdense")], "qdense."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    measured.stop()
    data = measured.get_data()
    lines = {os.path.relpath(path, ROOT): data.lines(path) for path in data.measured_files()}
    (WORK / "imports.json").write_text(json.dumps(lines))
    return 0


def _survey(file: str) -> int:
    import coverage
    import pytest

    measured = coverage.Coverage(data_file=None, source=["qdense"], config_file=False)
    tests: dict[str, dict[str, Any]] = {}
    fixtures: dict[str, float] = {}
    current = [""]

    class Plugin:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
            current[0] = item.nodeid
            tests[item.nodeid] = {"fixtures": list(item.fixturenames), "seconds": 0.0}
            measured.switch_context(item.nodeid)
            return (yield)

        @pytest.hookimpl(wrapper=True)
        def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
            started = time.monotonic()
            if fixturedef.scope != "function":  # its lines are run for every test that asks for it
                measured.switch_context(f"fixture:{fixturedef.argname}")
            try:
                return (yield)
            finally:
                fixtures[fixturedef.argname] = time.monotonic() - started
                measured.switch_context(current[0])

        def pytest_runtest_logreport(self, report: Any) -> None:
            test = tests[report.nodeid]
            if report.when == "call":
                test["seconds"] += report.duration
            test["passed"] = test.get("passed", True) and report.passed

    measured.start()
    code = int(pytest.main([file, "-q", "-p", "no:cacheprovider", "-m", "not gpu and not network"], plugins=[Plugin()]))
    measured.stop()
    data = measured.get_data()
    by_test: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for path in data.measured_files():
        for line, contexts in data.contexts_by_lineno(path).items():
            for context in contexts:
                by_test[context][os.path.relpath(path, ROOT)].append(line)
    result = {}
    for name, test in tests.items():
        if test.get("passed"):
            lines: dict[str, set[int]] = defaultdict(set)
            for context in (name, *(f"fixture:{fixture}" for fixture in test["fixtures"])):
                for module, own in by_test[context].items():
                    lines[module] |= set(own)
            seconds = test["seconds"] + sum(fixtures.get(fixture, 0) for fixture in test["fixtures"])
            result[name] = {"seconds": seconds, "lines": {module: sorted(own) for module, own in lines.items()}}
    (WORK / "survey" / f"{file.replace('/', '.')}.json").write_text(json.dumps(result))
    return code


def tests_of(mutant: Mutant, surveyed: dict[str, Any], imported: set[int], budget: float) -> tuple[list[str], float]:
    """Those that execute its statement (of one that importing executes: anything of the module, or of its package's tests)."""
    inside = {
        line
        for function in ast.walk(ast.parse((ROOT / mutant.module).read_text()))
        if isinstance(function, ast.FunctionDef)
        for line in range(function.body[0].lineno, (function.end_lineno or 0) + 1)
    }
    statement = set(range(mutant.statement[0], mutant.statement[1] + 1))
    package = f"tests/{Path(mutant.module).parent.name}/"
    able = [name for name, test in surveyed.items() if statement & set(test["lines"].get(mutant.module, ()))]
    if statement & imported:  # what importing makes is used by tests that do not run it
        able = [name for name, test in surveyed.items() if inside & set(test["lines"].get(mutant.module, ()))]
        able += [name for name in surveyed if name.startswith(package) and name not in able]
    able.sort(key=lambda name: surveyed[name]["seconds"] * (1 if name.startswith(package) else 3))
    chosen: list[str] = []
    seconds = 0.0
    for name in able:
        if seconds + surveyed[name]["seconds"] <= budget or not chosen:
            chosen.append(name)
            seconds += surveyed[name]["seconds"]
    return chosen, seconds


# --- running them ---------------------------------------------------------------------------------------------------------


class _Mutated(importlib.machinery.SourceFileLoader):
    """Loads one module from other source than its file's."""

    source = ""

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self.path, self.source = ROOT / mutant.module, mutant.source()
        self.name = mutant.module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        loader = _Mutated(fullname, str(self.path))
        loader.source = self.source
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


def _judge(mutant: Mutant, tests: Sequence[str], verdict: Path) -> int:
    """In a fork: run the tests on the mutant and write how it ended."""
    import pytest

    finder = _Finder(mutant)
    sys.meta_path.insert(0, finder)
    lines = finder.source.splitlines(keepends=True)
    # For inspect, and so for Triton, which reads the source of a kernel.
    linecache.cache[str(finder.path)] = (len(finder.source), None, lines, str(finder.path))
    try:
        importlib.import_module(finder.name)
    except BaseException as error:
        verdict.write_text(json.dumps({"result": "killed", "by": f"import: {type(error).__name__}"}))
        return 1
    failed: list[str] = []
    order = {name: place for place, name in enumerate(tests)}
    ran: list[str] = []

    class Plugin:
        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            files: dict[str, int] = {}
            for name in tests:
                files.setdefault(name.partition("::")[0], len(files))
            items[:] = [item for item in items if item.nodeid in order]
            items.sort(key=lambda item: (files[item.nodeid.partition("::")[0]], order[item.nodeid]))

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                failed.append(f"collecting {report.nodeid}")

        def pytest_keyboard_interrupt(self) -> None:
            failed.append("KeyboardInterrupt")

        def pytest_runtest_logreport(self, report: Any) -> None:
            ran.append(report.nodeid)
            if report.failed:
                failed.append(report.nodeid)

    files = sorted({name.partition("::")[0] for name in tests})
    basetemp = verdict.with_suffix(".tmp")
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", f"--basetemp={basetemp}"]
    code = int(pytest.main([*files, *options], plugins=[Plugin()]))
    if failed:
        verdict.write_text(json.dumps({"result": "killed", "by": failed[0]}))
    else:
        verdict.write_text(json.dumps({"result": "survived" if code == 0 and ran else "error", "by": f"exit {code}"}))
    return code


def _start(work: Callable[[], int], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        code = work()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _forked(work: Callable[[], int], limit: float) -> int:
    child, deadline = _start(work, WORK / "survey.log"), time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def run(modules: Sequence[str], *, sample: int, seed: int, budget: float, jobs: int, again: bool, by: str) -> None:
    surveyed: dict[str, Any] = {}
    for path in sorted((WORK / "survey").glob("*.json")):
        surveyed |= {name: test for name, test in json.loads(path.read_text()).items() if re.search(by, name)}
    imported = json.loads((WORK / "imports.json").read_text())
    before = results()
    queue = []
    for module in modules:
        found = mutants(module)
        _note(WORK / "mutants.jsonl", {"module": module, "mutants": len(found)})
        random.Random(f"{seed} {module}").shuffle(found)
        if again:
            queue += [
                mutant
                for mutant in found
                if before.get(mutant.key, {}).get("result") in ("survived", "error", "timeout")
            ]
        else:
            queue += [mutant for mutant in (found[:sample] if sample else found) if mutant.key not in before]
    print(f"{len(queue)} mutants to run", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="qdense-mutation-"))
    running: dict[int, tuple[Mutant, Path, float, float, int]] = {}
    number = 0
    while queue or running:
        while queue and len(running) < jobs:
            mutant = queue.pop(0)
            tests, seconds = tests_of(mutant, surveyed, set(imported[mutant.module]), budget)
            if not tests:
                if not by:
                    _record(mutant, {"result": "survived", "by": "no test executes it"}, 0, 0)
                continue
            number += 1
            verdict = folder / str(number)
            child = _start(partial(_judge, mutant, tests, verdict), verdict.with_suffix(".log"))
            running[child] = mutant, verdict, time.monotonic(), 20 + 4 * seconds, len(tests)
        for child, (mutant, verdict, started, limit, num_tests) in list(running.items()):
            took = time.monotonic() - started
            ended, _ = os.waitpid(child, os.WNOHANG)
            if not ended and took > limit:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                outcome = {"result": "timeout", "by": f"{limit:.0f} s"}
            elif not ended:
                continue
            elif verdict.exists():
                outcome = json.loads(verdict.read_text())
            else:
                outcome = {"result": "error", "by": "the process ended"}
            del running[child]
            if outcome["result"] == "killed" or not by:  # who outlives some tests is not known to outlive all
                _record(mutant, outcome, took, num_tests)
            shutil.rmtree(verdict.with_suffix(".tmp"), ignore_errors=True)
            if outcome["result"] == "killed":
                verdict.with_suffix(".log").unlink(missing_ok=True)
        time.sleep(0.05)


# --- results --------------------------------------------------------------------------------------------------------------


def _note(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def _record(mutant: Mutant, outcome: dict[str, str], seconds: float, num_tests: int) -> None:
    pairs = zip((ROOT / mutant.module).read_text().splitlines(), mutant.source().splitlines(), strict=False)
    before, after = next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("", ""))
    facts = asdict(mutant) | {"before": before, "after": after, "seconds": round(seconds, 1), "tests": num_tests}
    _note(WORK / "results.jsonl", facts | outcome)
    if outcome["result"] != "killed":
        print(
            f"{mutant.module}:{mutant.line} {outcome['result']} ({outcome['by']}; {num_tests} tests, {seconds:.0f} s)"
        )
        print(f"    {before}\n    {after}", flush=True)


def results() -> dict[tuple[str, ...], dict[str, Any]]:
    """The latest of each mutant of the modules as they are."""
    path, latest = WORK / "results.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        facts = json.loads(line)
        module = ROOT / facts["module"]
        if module.exists() and hashlib.sha256(module.read_bytes()).hexdigest()[:8] == facts["digest"]:
            latest[tuple(str(facts[key]) for key in ("module", "digest", "operator", "occurrence"))] = facts
    return latest


def report() -> None:
    from qdense.benchmarks.accuracy import wilson_interval

    totals = {}
    for line in (WORK / "mutants.jsonl").read_text().splitlines():
        facts = json.loads(line)
        totals[facts["module"]] = facts["mutants"]
    by_module = defaultdict(list)
    for outcome in results().values():
        by_module[outcome["module"]].append(outcome)
    print(
        "| module | mutants | tried | killed | by a test | at import | timeout | survived | error | killed, % | 95% interval |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    rows = [(module, totals[module], own) for module, own in sorted(by_module.items())]
    everything = [outcome for _, _, own in rows for outcome in own]
    for name, total, own in [*rows, ("all", sum(total for _, total, _ in rows), everything)]:
        count = {kind: sum(o["result"] == kind for o in own) for kind in ("killed", "timeout", "survived", "error")}
        imported = sum(o["result"] == "killed" and o["by"].startswith("import") for o in own)
        killed = count["killed"] + count["timeout"]
        low, high = wilson_interval(killed, len(own))
        interval = "all tried" if len(own) == total else f"{low:.0%} to {high:.0%}"
        print(
            f"| {name} | {total} | {len(own)} | {killed} | {count['killed'] - imported} | {imported} | {count['timeout']} "
            f"| {count['survived']} | {count['error']} | {killed / len(own):.1%} | {interval} |"
        )
    for outcome in sorted(everything, key=lambda o: (o["module"], o["line"])):
        if outcome["result"] in ("survived", "error"):
            print(
                f"\n{outcome['module']}:{outcome['line']} {outcome['operator']} ({outcome['by']}, {outcome['tests']} tests)"
            )
            print(f"    {outcome['before']}\n    {outcome['after']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("survey", "run", "report"))
    parser.add_argument("files", nargs="*", help="survey: test files (default: all that matter); run: modules")
    parser.add_argument(
        "--sample", type=int, default=0, help="this many mutants of each module, drawn by --seed (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of tests a mutant")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--by", default="", help="only tests whose names match, such as the ones just written")
    parser.add_argument("--again", action="store_true", help="the survivors so far")
    arguments = parser.parse_intermixed_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    WORK.mkdir(parents=True, exist_ok=True)
    if arguments.command == "report":
        return report()
    os.environ.update({"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"})
    for name in PRELOADED:
        importlib.import_module(name)
    assert "qdense" not in sys.modules
    gc.freeze()  # else each fork copies everything for its first collection, which takes longer than the tests
    if arguments.command == "survey":
        every = (path for name in TESTS for path in sorted((ROOT / "tests").glob(name)))
        return survey(arguments.files or [str(path.relative_to(ROOT)) for path in every])
    settings = {key: getattr(arguments, key) for key in ("sample", "seed", "budget", "jobs", "again", "by")}
    run(arguments.files, **settings)


if __name__ == "__main__":
    main()
