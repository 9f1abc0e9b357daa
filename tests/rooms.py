"""The map of the code, read from the code: its modules, each below those that it imports.

A room is a package inside features/ or probe/; a module that lies flat in either is a room of its
own. Modules are listed so that each imports only from those above it, and rooms stay whole.
"""

import ast
import functools
from graphlib import TopologicalSorter

from conftest import ROOT


@functools.cache
def modules():
    """Return {dotted name: (file, its tree)} of everything that is installed."""
    files = [ROOT / "cli.py", *(ROOT / "features").rglob("*.py"), *(ROOT / "probe").rglob("*.py")]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    return {n.removesuffix(".__init__"): (f, ast.parse(f.read_text())) for n, f in names.items()}


def imports(tree):
    """Return the dotted names that a module imports, at its top or anywhere inside."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def graph():
    """Return {module: modules it imports}; the packages around a module are not counted."""
    known = modules()
    uses = {n: imports(tree) & known.keys() - {n} for n, (_, tree) in known.items()}
    return {n: {u for u in used if not n.startswith(f"{u}.")} for n, used in uses.items()}


def room(name):
    """Return the room of a module: "probe.solve" of probe.solve.rows, itself of probe.heads."""
    return ".".join(name.split(".")[:2])


def between_rooms(uses):
    """Return {room: rooms it imports}."""
    found = {}
    for name, used in uses.items():
        found.setdefault(room(name), set()).update({room(u) for u in used} - {room(name)})
    return found


def order(uses):
    """Return names so that each comes after those it uses, else by the alphabet.

    Raises graphlib.CycleError where imports go round.
    """
    sorter = TopologicalSorter(uses)
    sorter.prepare()
    ordered, ready = [], []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()])
        ordered.append(ready.pop(0))
        sorter.done(ordered[-1])
    return ordered


def first_line(name):
    """Return what a module says of itself first."""
    _, tree = modules()[name]
    return ast.get_docstring(tree).split("\n")[0].removesuffix(".")


def drawn():
    """Yield the lines of the map: every room and file, below those that it imports."""
    uses = graph()
    for top in ("features", "probe"):
        yield f"{top}/  {first_line(top)}"
        for name in order(between_rooms(uses)):
            inside = [n for n in order(uses) if room(n) == name and n != name]
            leaf = name.removeprefix(f"{top}.")
            if name.startswith(f"{top}.") and inside:
                yield f"  {leaf}/  {first_line(name)}"
                for each in inside:
                    yield f"    {each.rpartition('.')[2]}.py  {first_line(each)}"
            elif name.startswith(f"{top}."):
                yield f"  {leaf}.py  {first_line(name)}"
    yield f"cli.py  {first_line('cli')}"
