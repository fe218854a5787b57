"""The floors of the house, from the code's own imports: `python -m tests.architecture [--write]`.

Prints every folder with its floor (a folder stands one above the highest it imports from), the number of floors and of
circles, and the imports that are made inside functions. `--write` draws the same into docs/architecture.md.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by python -m tests.architecture --write -->", "<!-- end -->"
OURS = ("audit", "pipelines")
LAZY = {
    # what keeps torch, diffusers and transformers out of commands that only read, by the module that does it
    "audit.index.descriptors": {"pipelines.descriptor"},
    "audit.mitigation.config": {"pipelines.alignment"},
    "audit.mitigation.mitigate_shard": {"pipelines"},
    "audit.mitigation.prompt": {"pipelines"},
    "audit.scores.model": {
        "pipelines.compiled",
        *("pipelines.configurations", "pipelines.families.defaults", "pipelines.folders", "pipelines.loading"),
    },
    "audit.scores.null_maps": {"pipelines", "pipelines.null_maps"},
    "audit.scores.prompt": {"pipelines"},
    "audit.scores.scan": {
        *("pipelines.attention", "pipelines.families.defaults", "pipelines.formulas", "pipelines.loading"),
    },
    "audit.scores.scorer": {"pipelines", "pipelines.batching"},
    "audit.scores.self_check": {"pipelines.compiled", "pipelines.float8"},
    "audit.scores.trajectories": {"pipelines", "pipelines.batching"},
    "audit.verdicts.compare": {"pipelines.formulas"},
}
"""Imports of our own packages inside functions that are meant; the command line's own are free."""


def folder_of(module: str) -> str:
    """`audit.run.stage` -> `audit/run`; `pipelines.formulas` -> `pipelines`."""
    parts = module.split(".")
    return "/".join(parts[:2]) if parts[0] == "audit" and len(parts) > 1 else parts[0]


def folder_graph() -> dict[str, set[str]]:
    """Which folders each folder imports from, imports inside functions counted."""
    graph = grimp.build_graph("audit", "pipelines", include_external_packages=False)
    found: dict[str, set[str]] = {folder_of(module): set() for module in graph.modules if module != "audit"}
    for module in graph.modules - {"audit"}:
        for imported in graph.find_modules_directly_imported_by(module) - {"audit"}:
            if folder_of(imported) != folder_of(module):
                found[folder_of(module)].add(folder_of(imported))
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of folders that import each other, in a circle of any length."""
    reach = {name: _reachable(graph, name) for name in graph}
    groups = {frozenset({name, *(other for other in reach[name] if name in reach[other])}) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1 or next(iter(group)) in reach[next(iter(group))])


def _reachable(graph: dict[str, set[str]], name: str) -> set[str]:
    found: set[str] = set()
    todo = list(graph[name])
    while todo:
        other = todo.pop()
        if other not in found:
            found.add(other)
            todo += graph[other]
    return found


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Floor of every folder, 1 the lowest; of a graph without circles."""
    found: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in found:
            found[name] = 1 + max((floor(other) for other in graph[name]), default=0)
        return found[name]

    for name in graph:
        floor(name)
    return found


def lazy_imports() -> Iterator[tuple[str, str]]:
    """(module, what it imports of our own packages inside a function), the command line left out."""
    for path in sorted([*(ROOT / "audit").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module.startswith("audit.cli."):
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for node in ast.walk(function):
                    names = [node.module] if isinstance(node, ast.ImportFrom) else []
                    names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                    yield from (
                        (module, name) for name in names if name and name.split(".")[0] in ("audit", "pipelines")
                    )


def drawing(graph: dict[str, set[str]]) -> str:
    """The floors as a Mermaid picture: an arrow to every folder that is imported and not reached on another way."""
    found = floors(graph)
    name = lambda folder: folder.replace("audit/", "").replace("/", "_")  # noqa: E731
    lines = ["```mermaid", "flowchart BT"]
    for level in sorted(set(found.values())):
        lines.append(f'  subgraph floor{level}["floor {level}"]')
        lines += [f'    {name(folder)}["{folder}/"]' for folder in sorted(found) if found[folder] == level]
        lines.append("  end")
    for folder in sorted(graph, key=lambda each: (found[each], each)):
        for other in sorted(graph[folder]):
            if not any(other in _reachable(graph, between) for between in graph[folder] - {other}):
                lines.append(f"  {name(other)} --> {name(folder)}")
    return "\n".join([*lines, "```"])


def lines(graph: dict[str, set[str]]) -> list[str]:
    """What is printed."""
    loops = circles(graph)
    if loops:
        return [f"circle: {', '.join(group)}" for group in loops] + [f"{len(loops)} circles"]
    found = floors(graph)
    told = [f"floor {found[name]}  {name}/" for name in sorted(found, key=lambda each: (-found[each], each))]
    inside = len(set(lazy_imports()))
    return [*told, f"{max(found.values())} floors, 0 circles, {inside} imports inside functions (all listed by name)"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="draw it into docs/architecture.md")
    graph = folder_graph()
    print("\n".join(lines(graph)))
    if parser.parse_args().write:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n\n{drawing(graph)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
