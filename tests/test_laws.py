"""The laws of the house, read from the code: which room may import which, what is public, how long a module may be.

The rooms of a chapter stand in attnbook/<chapter>/: reference, kernels, transport, op, nets, study. What several chapters need is a foundation.
"""

import ast
from pathlib import Path

import pytest

from attnbook.lab.book import CHAPTERS as BOOK

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "attnbook"
CHAPTERS = {c.name for c in BOOK.values() if c.paper}

# An arrow goes from a room to one of no higher rank. A room may be split: channel_kernels has the rank of kernels.
RANKS = {"reference": 0, "kernels": 1, "transport": 2, "op": 3, "nets": 4, "study": 5}

# Rooms of another name: the room they stand beside, and what they hold that would make it too long.
OTHER_ROOMS = {
    "music.midi": ("reference", "notes to tokens and back, and files of notes"),
    "neighborhood.tiles": ("kernels", "which tiles of queries and boxes of keys cover a window"),
    "neighborhood.programs": ("kernels", "the kernels as tile programs of the engine, with their launch tables"),
    "neighborhood.simulator": ("kernels", "how long a kernel takes, predicted from its tiles"),
    "cca.cache": ("op", "the cache of a decoding step, and the step"),
    "ring.costs": ("reference", "formulas of memory, traffic and time"),
    "ring.shards": ("transport", "how a sequence is cut into shards and joined"),
    "ring.schedule": ("op", "what a rank computes, and when it talks"),
    "ring.ranks": ("study", "what the processes of a group run"),
    "ring.experiments": ("study", "experiments in simulation, and the peers"),
    "ring.cluster": ("study", "the measurement on several GPUs"),
}
PUBLIC, LINES, MOST_LINES = 30, 500, 800

# Modules of more than 500 lines, each with the reason. None may have more than 800.
LONG = {"lab.bench": "one stopwatch: what is measured, how peers take turns and what is recorded belong together"}


def name_of(path: Path) -> str:
    """The module of a file, below attnbook: halo.op; a package by its own name, attnbook itself by none."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(p): p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "_modidx.py"}


def chapter_of(module: str) -> str | None:
    """The chapter that a module belongs to; None for foundations."""
    first = module.split(".")[0]
    return first if first in CHAPTERS else None


def room_of(module: str) -> str:
    """The kind of a module's room: kernels for halo.kernels and davit.channel_kernels, study for what is run by itself."""
    if module in OTHER_ROOMS:
        return OTHER_ROOMS[module][0]
    name = module.split(".")[-1] if "." in module else ""
    return "study" if name == "__main__" else name.split("_")[-1]


def imports(module: str) -> list[tuple[str, str]]:
    """What a module imports of attnbook, also inside functions: (module below attnbook, name), the name empty for the module itself."""
    path, found = SOURCES[module], []
    here = [p for p in module.split(".") if p]
    here = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(a.name.partition(".")[2], "") for a in node.names if a.name.split(".")[0] == "attnbook"]
        elif isinstance(node, ast.ImportFrom):
            source = (node.module or "").split(".") if node.module else []
            if node.level:
                source = here[: len(here) - node.level + 1] + source
            elif source[:1] == ["attnbook"]:
                source = source[1:]
            else:
                continue
            for a in node.names:
                whole = ".".join([*source, a.name])
                found.append((whole, "") if whole in SOURCES else (".".join(source), a.name))
    return found


def test_imports_are_found():
    """The other laws rest on this: a relative import, an absolute one, one of a module, one inside a function."""
    assert ("results", "newest_device") not in imports("lab.stats") and ("lab.results", "newest_device") in imports(
        "lab.stats"
    )
    assert ("lab.book", "CHAPTERS") in imports("lab.run") and all(m in SOURCES for m, _ in imports("lab.cli"))


@pytest.mark.parametrize("module", SOURCES)
def test_arrows_only_fall(module):
    chapter, wrong = chapter_of(module), []
    for source, _ in imports(module):
        other = chapter_of(source)
        if room_of(source) == "study" and room_of(module) != "study":
            wrong.append(f"imports {source}: nothing rests on experiments")
        elif other and not chapter:
            wrong.append(f"is a foundation and imports the chapter {source}")
        elif (
            source.split(".")[0] == "lab"
            and module.split(".")[0] != "lab"
            and room_of(module) != "study"
            and module != "__main__"
        ):
            wrong.append(f"imports {source}: only study and lab may")
        elif other and chapter and "." in module and "." in source and RANKS[room_of(source)] > RANKS[room_of(module)]:
            wrong.append(f"imports {source}, which stands above it")
    assert not wrong, f"attnbook.{module} " + "; ".join(wrong)


@pytest.mark.parametrize("chapter", sorted(CHAPTERS & {m.split(".")[0] for m in SOURCES}))
def test_chapters_are_packages(chapter):
    assert SOURCES[chapter].name == "__init__.py" and f"{chapter}.study" in SOURCES


@pytest.mark.parametrize("module", [m for m in SOURCES if chapter_of(m) and "." in m])
def test_rooms_are_the_known_ones(module):
    assert module.count(".") == 1 and room_of(module) in RANKS, (
        f"attnbook.{module}: rooms are {', '.join(RANKS)}, names that end in _<room>, or stand in OTHER_ROOMS with a reason"
    )


@pytest.mark.parametrize("module", SOURCES)
def test_private_names_stay_at_home(module):
    """A chapter uses documented functions of other packages, never a `_name`."""
    home, text = module.split(".")[0], SOURCES[module].read_text(encoding="utf-8")
    if home == "lab":
        return
    private = lambda n: n.startswith("_") and not n.startswith("__")
    wrong = [f"{source}.{name}" for source, name in imports(module) if private(name) and source.split(".")[0] != home]
    names = {
        (source or name).split(".")[-1] for source, name in imports(module) if not name and source.split(".")[0] != home
    }
    wrong += [
        f"{n.value.id}.{n.attr}"
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in names and private(n.attr)
    ]
    assert not wrong, f"attnbook.{module} uses {', '.join(sorted(set(wrong)))}"


@pytest.mark.parametrize("package", [m for m, p in SOURCES.items() if chapter_of(m) and p.name == "__init__.py"])
def test_what_is_public_is_few(package):
    tree = ast.parse(SOURCES[package].read_text(encoding="utf-8"))
    public = next(
        ast.literal_eval(n.value)
        for n in tree.body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
    )
    assert 0 < len(public) <= PUBLIC, f"attnbook.{package} has {len(public)} public names"
    assert not [n for n in public if n.startswith("_")]


@pytest.mark.parametrize("module", SOURCES)
def test_public_functions_and_classes_have_docstrings(module):
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    bare = [
        n.name
        for n in tree.body
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not n.name.startswith("_")
        and not ast.get_docstring(n)
    ]
    assert not bare, f"attnbook.{module}: no docstring in {', '.join(bare)}"


@pytest.mark.parametrize("module", SOURCES)
def test_modules_are_short(module):
    lines = len(SOURCES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= (MOST_LINES if module in LONG else LINES), (
        f"attnbook.{module} has {lines} lines: split it, or give the reason in LONG (at most {MOST_LINES})"
    )


@pytest.mark.parametrize("module", LONG)
def test_exceptions_are_needed(module):
    assert len(SOURCES[module].read_text(encoding="utf-8").splitlines()) > LINES, (
        f"attnbook.{module} is short now: strike it from LONG"
    )
