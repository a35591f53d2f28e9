"""The names that a recipe may use for a model's submodules, besides their paths.

stage3          the last submodule of the third stage of a known backbone
embedding       the submodule that returns the embedding
layer[1-4]      every submodule that the pattern matches; blocks.* and block?.conv work too
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

from torch import nn

from kdhooks.backbones import known_stages
from kdhooks.errors import KDHooksError, listed
from kdhooks.paths import children_of, split_path, submodules, without_wrappers

_NAME = re.compile(r"(?:(\d+)\.)?(?:stage\d+|embedding)")  # the number is that of a teacher


@dataclass(frozen=True)
class Points:
    """The submodules of one model, and the names that stand for them.

    A submodule whose path is also a name or a pattern takes precedence.
    """

    model: nn.Module
    stages: tuple[str, ...]  # of a known backbone, shallow to deep
    names: Mapping[str, str]  # name -> path

    @classmethod
    def of(cls, model: nn.Module, stages: Sequence[str] | None, embedding: str) -> Self:
        """Create the names of a model. stages: by default those of a known backbone."""
        known = submodules(model)
        if stages is None:
            stages = known_stages(model)
            if stages is None or not {without_wrappers(path) for path in stages} <= known.keys():
                stages = ()  # as if the class only shared the name of a known backbone
        names = {f"stage{number}": path for number, path in enumerate(stages, 1)}
        return cls(model, tuple(stages), {**names, "embedding": embedding})

    def one(self, path: str, side: str) -> str:
        """Return the only path that `path` stands for. side: for errors, as "fitnet: student"."""
        found = list(self._paths(path, side))
        if len(found) > 1:
            raise KDHooksError(
                f"{side} must name one submodule; '{path}' matches {len(found)}: {listed(found)}; "
                "name one of them"
            )
        return found[0]

    def several(self, paths: Iterable[str], side: str) -> tuple[str, ...]:
        """Return all paths that `paths` stand for; those of a pattern are in natural order."""
        return tuple(found for path in paths for found in self._paths(path, side))

    def names_of(self, path: str) -> list[str]:
        """Return the names that stand for a path, except those that are also a submodule's path."""
        known = submodules(self.model)
        return [name for name, found in self.names.items() if found == path and name not in known]

    def _paths(self, path: str, side: str) -> Iterator[str]:
        name = split_path(path, side).name
        suffix = path.removeprefix(name)
        known = submodules(self.model)
        if not name or without_wrappers(name) in known:
            yield path
        elif name in self.names:
            yield self.names[name] + suffix
        elif any(character in name for character in "*?["):
            found = sorted((one for one in known if _matches(one, name)), key=_natural)
            if not found:
                raise KDHooksError(
                    f"{side} has no submodule that '{name}' matches (* stands for a part between "
                    f"two dots); its children are: {listed(children_of(self.model))}"
                )
            yield from (one + suffix for one in found)
        elif (meant := _NAME.fullmatch(name)) and (owner := self._owner(meant[1])) is not None:
            raise KDHooksError(self._unknown(name, side, owner))
        else:
            yield path  # it is refused later, with the reason

    def _owner(self, number: str | None) -> nn.Module | None:
        """Return the teacher of this number; without a number, the model if it is the only one."""
        if number is None:
            return None if "0.embedding" in self.names else self.model
        return submodules(self.model).get(number)

    def _unknown(self, name: str, side: str, model: nn.Module) -> str:
        stages = [f"{name} ({path})" for name, path in self.names.items() if "stage" in name]
        known = (
            f"the known stages of its backbone are: {listed(stages)}"
            if stages
            else f"the stages of a {type(model).__name__} are not known"
        )
        children = listed(children_of(model))
        return f"{side} has no submodule '{name}'; {known}; its children are: {children}"


def _matches(path: str, pattern: str) -> bool:
    """Match a path part by part, so that * does not match a dot."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _natural(path: str) -> list[tuple[int, int | str]]:
    """Return a key that sorts blocks.2 before blocks.10."""
    parts = re.split(r"(\d+)", path)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]
