"""A Python that sees the packages of one extra of attnbook only, though more are installed: what a plain `pip install` would give.

`hidden_env(folder, "book")` is an environment for a process, and for those that it starts, in which everything is missing that the extra does not bring.
"""

import importlib.metadata
import os
import re
import tomllib
from functools import lru_cache
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

SITE = """
import re, sys
from importlib.machinery import PathFinder
MODULES, PACKAGES = {modules!r}, {packages!r}

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in MODULES else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        return (d for d in PathFinder.find_distributions(*args, **kwargs) if re.sub("[-_.]+", "-", d.name).lower() not in PACKAGES)

sys.meta_path[:] = [Hiding if f is PathFinder else f for f in sys.meta_path]
"""


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(lines: list[str]) -> set[str]:
    """The packages that a list of requirements brings, with those that they bring."""
    found, todo = set(), [(Requirement(line), "") for line in lines]
    while todo:
        need, extra = todo.pop()
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        name = plain(need.name)
        try:
            theirs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for e in ["", *need.extras]:
            if (name, e) not in found:
                found.add((name, e))
                todo += [(Requirement(line), e) for line in theirs]
    return {name for name, _ in found}


@lru_cache(maxsize=None)
def packages_of(extra: str = "", data: bool = False) -> set[str]:
    """The packages of a plain install, or of one with an extra."""
    lines = PROJECT["dependencies"] + (PROJECT["optional-dependencies"][extra] if extra else [])
    found = closure(lines) | {"attnbook"}
    if data:
        found |= {
            plain(re.match(r"[\w.-]+", line)[0])
            for line in (ROOT / "requirements-data.txt").read_text().splitlines()
            if line and line[0] != "#"
        }
    return found


@lru_cache(maxsize=None)
def modules() -> dict[str, set[str]]:
    """The packages that bring a module, by its first name."""
    return {m: {plain(n) for n in names} for m, names in importlib.metadata.packages_distributions().items()}


def modules_of(packages: set[str]) -> set[str]:
    """The modules, by first name, that packages bring."""
    return {m for m, names in modules().items() if names & packages}


def hidden_env(folder: Path, extra: str = "", data: bool = False, library: Path = ROOT) -> dict[str, str]:
    """The environment of a process; `library` is the folder that holds attnbook."""
    seen = packages_of(extra, data)
    hidden = {plain(d.name) for d in importlib.metadata.distributions() if d.name} - seen
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE.format(modules=set(modules()) - modules_of(seen), packages=hidden))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(library)])}
