"""What a person writes: a sweep in YAML, checked to the last key before anything starts.

A sweep is a grid of prune settings times a list of repairs (and of models, calibrations and seeds,
where a list is given). `read_sweep` gives a frozen `SweepSpec`, or one `SweepError` that names
every mistake: the line, the place in the file, the value, what would be right.
"""

import difflib
import math
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from yaml.constructor import ConstructorError

from jobs.allocation import AllocationSpec, UniformSpec
from jobs.errors import SpecError
from jobs.methods import MethodSpec
from jobs.pattern import Pattern
from jobs.spec import (
    BenchmarkSpec,
    CalibrationSpec,
    ModelSpec,
    RefineSpec,
    RepairSpec,
    Resources,
    RunPolicy,
    Spec,
    Tower,
)

MAX_FILE_BYTES = 1_000_000
MAX_NODES = 20_000
"""Values in a file once its aliases are written out: a few lines of aliases can hold billions."""
MAX_POINTS = 10_000
"""Of the grid, before any are left out."""
MAX_INTEGER = 2**63


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _named(value: Any) -> Any:
    """`sparsegpt` is short for `{name: sparsegpt}`."""
    return {"name": value} if isinstance(value, str) else value


def _benchmark(value: Any) -> Any:
    """`easy-vqa` is short for `{dataset: {format: easy-vqa}}`."""
    return {"dataset": value} if isinstance(value, str) else value


def _repair(value: Any) -> Any:
    """`none` is no repair; `sparse_lora` is short for `{method: sparse_lora}`."""
    if value in ("none", None):
        return None
    return {"method": value} if isinstance(value, str) else value


def _refine(value: Any) -> Any:
    """`none` is no refinement; `block` is short for `{unit: block}`."""
    if value in ("none", None):
        return None
    return {"unit": value} if isinstance(value, str) else value


def _fraction(value: float) -> float:
    if 0 <= value < 1:
        return value
    hint = f"; did you mean {value / 100:g}?" if 1 < value < 100 else ""
    raise PydanticCustomError(
        "fraction",
        "a sparsity is a fraction of zeros, from 0 up to but not 1{hint}",
        {"hint": hint},
    )


def _pattern(value: str) -> str:
    return str(Pattern.parse(value))


def _some_tower(value: dict[Tower, float]) -> dict[Tower, float]:
    if not value:
        raise ValueError(
            "names no tower; write all, vision, language, or a sparsity each: {vision: 0.4}"
        )
    return value


Sparsity = Annotated[float, AfterValidator(_fraction)]
Towers = Annotated[
    Annotated[Literal["all", "vision", "language"], Tag("name")]
    | Annotated[dict[Tower, Sparsity], AfterValidator(_some_tower), Tag("each")],
    Discriminator(lambda value: "each" if isinstance(value, dict) else "name"),
]


class GridSpec(Spec):
    """A product of settings. Each takes one value or a list."""

    method: Annotated[
        list[Annotated[MethodSpec, BeforeValidator(_named)]],
        BeforeValidator(_as_list),
        Field(min_length=1),
    ]
    """`magnitude`, or with options `{name: sparsegpt, damping: 0.05}`. `dense` prunes nothing."""
    pattern: Annotated[
        list[Annotated[str, AfterValidator(_pattern)]],
        BeforeValidator(_as_list),
        Field(min_length=1),
    ] = ["unstructured"]
    """`unstructured`, or N:M: N weights kept of every M. A pattern N:M fixes the sparsity."""
    sparsity: Annotated[list[Sparsity], BeforeValidator(_as_list)] = []
    """Fraction of zeros in each pruned tower. Not multiplied with a pattern N:M, nor with `towers`
    that name a sparsity each."""
    towers: Annotated[list[Towers], BeforeValidator(_as_list), Field(min_length=1)] = ["all"]
    """`all`, `vision`, `language`, or a sparsity each: `{vision: 0.4, language: 0.6}`."""
    allocation: Annotated[
        list[Annotated[AllocationSpec, BeforeValidator(_named)]],
        BeforeValidator(_as_list),
        Field(min_length=1),
    ] = [UniformSpec()]
    """How a tower's zeros are shared out among its layers: `uniform`, `owl`, or with options
    `{name: atp, slope: 0.01}`. Anything but uniform needs the pattern unstructured."""
    refine: Annotated[
        list[Annotated[RefineSpec | None, BeforeValidator(_refine)]],
        BeforeValidator(_as_list),
        Field(min_length=1),
    ] = [None]
    """Local reconstruction after pruning: `none`, `block`, `submodule`, or with options
    `{unit: block, num_steps: 100}`."""

    @model_validator(mode="after")
    def _sparsity_is_used(self) -> "GridSpec":
        has_own = [each for each in self.pattern if Pattern.parse(each).sparsity is not None]
        by_tower = [each for each in self.towers if isinstance(each, dict)]
        if self.sparsity and (has_own == self.pattern or by_tower == self.towers):
            whose = f"the pattern {has_own[0]} has" if has_own == self.pattern else "towers have"
            raise ValueError(f"sparsity is {self.sparsity}, and {whose} a sparsity already")
        return self


class ExcludeSpec(Spec):
    """Grid points to leave out: those that match every value given here."""

    method: str | None = None
    pattern: str | None = None
    sparsity: Sparsity | None = None
    towers: Towers | None = None
    allocation: str | None = None
    refine: Literal["none", "block", "submodule"] | None = None
    repair: Literal["none", "sparse_lora", "lora", "spp", "norms", "full"] | None = None

    @model_validator(mode="after")
    def _names_something(self) -> "ExcludeSpec":
        if not self.model_fields_set:
            raise PydanticCustomError("exclude", "it names nothing and would leave out everything")
        return self


class SweepSpec(RunPolicy):
    """A pruning study. Where a list is given for a single value, its values multiply the grid."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Letters, digits, `.`, `_` and `-`."""
    model: Annotated[
        list[Annotated[ModelSpec, BeforeValidator(_named)]],
        BeforeValidator(_as_list),
        Field(min_length=1),
    ]
    calibration: Annotated[
        list[CalibrationSpec], BeforeValidator(_as_list), Field(min_length=1)
    ] = [CalibrationSpec()]
    grid: Annotated[list[GridSpec], BeforeValidator(_as_list), Field(min_length=1)]
    """One grid, or a list of grids that are added up."""
    exclude: Annotated[list[ExcludeSpec], BeforeValidator(_as_list)] = []
    repair: Annotated[
        list[Annotated[RepairSpec | None, BeforeValidator(_repair)]],
        BeforeValidator(_as_list),
        Field(min_length=1),
    ] = [None]
    evaluate: Annotated[
        list[Annotated[BenchmarkSpec, BeforeValidator(_benchmark)]],
        BeforeValidator(_as_list),
        Field(min_length=1),
    ]
    seed: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**63)]], BeforeValidator(_as_list), Field(min_length=1)
    ] = [0]
    resources: Resources = Resources()

    @field_validator("evaluate")
    @classmethod
    def _benchmarks_differ(cls, value: list[BenchmarkSpec]) -> list[BenchmarkSpec]:
        labels = [benchmark.label for benchmark in value]
        for label in labels:
            if labels.count(label) > 1:
                raise PydanticCustomError(
                    "benchmarks",
                    "two benchmarks are called {label}; a benchmark has its file's name",
                    {"label": label},
                )
        return value

    @model_validator(mode="after")
    def _is_not_endless(self) -> "SweepSpec":
        points = _num_points(self) * sum(_num_points(grid) for grid in self.grid)
        if points > MAX_POINTS:
            raise PydanticCustomError(
                "points",
                "the grid has {points} points, more than {limit}: make a sweep of each part",
                {"points": points, "limit": MAX_POINTS},
            )
        return self


def _num_points(spec: Spec) -> int:
    """The product of the lengths of all lists that multiply the grid."""
    lists = (
        value
        for name, value in spec
        if isinstance(value, list) and name not in ("grid", "exclude", "evaluate")
    )
    return math.prod(max(1, len(value)) for value in lists)


class SweepError(SpecError):
    """A sweep file with mistakes; the message has a paragraph for each."""


def read_sweep(path: Path) -> SweepSpec:
    """Read and check a sweep file. Paths in it are relative to its folder.

    Raises:
        SweepError: anything wrong with it.
    """
    try:
        if not stat.S_ISREG((status := path.stat()).st_mode):
            raise SweepError(f"{path}: cannot be read: it is no file")
        if status.st_size > MAX_FILE_BYTES:
            raise SweepError(f"{path} is larger than {MAX_FILE_BYTES} bytes: not a sweep")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(f"{path}: cannot be read: {error}") from error
    return parse_sweep(text, str(path), base=path.parent)


def parse_sweep(text: str, source: str, *, base: Path) -> SweepSpec:
    """Check the text of a sweep; `source` names it in errors, `base` anchors relative paths."""
    node, value = _parse_yaml(text, source)
    try:
        sweep = SweepSpec.model_validate(value)
    except ValidationError as error:
        raise SweepError("\n".join(_tell_mistakes(error.errors(), node, source))) from None
    try:
        return _anchored(sweep, base)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL, ~nobody
        raise SweepError(f"{source}: a path that cannot be: {error}") from error


def _anchored(sweep: SweepSpec, base: Path) -> SweepSpec:
    """The sweep with the paths of its models and datasets made absolute."""

    def anchor(value: Any) -> Any:
        if isinstance(value, dict):
            if "format" in value:
                for name in ("path", "images"):
                    if value.get(name):
                        value[name] = str((base / Path(value[name]).expanduser()).resolve())
            return {name: anchor(child) for name, child in value.items()}
        return [anchor(child) for child in value] if isinstance(value, list) else value

    data = anchor(sweep.model_dump(mode="json", exclude_unset=True))
    for model in data["model"]:
        beside = base / Path(model["name"]).expanduser()
        if (beside / "config.json").is_file():
            model["name"] = str(beside.resolve())
    return SweepSpec.model_validate(data)


class _Loader(yaml.SafeLoader):
    """Safe, and an unquoted 2:4 is text: to YAML 1.1 it is 124, a time in base 60."""

    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise _too_many()
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = int(super().construct_yaml_int(node))
        if abs(value) >= MAX_INTEGER:
            raise ConstructorError(None, None, "an integer beyond 64 bits", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _too_many() -> ValueError:
    return ValueError(f"more than {MAX_NODES} values once its aliases are expanded")


_BASE_60 = ("tag:yaml.org,2002:str", re.compile(r"[-+]?[0-9]+(:[0-9]+)+$"))
_Loader.yaml_implicit_resolvers = {
    first: [_BASE_60, *resolvers] if first in "-+0123456789" else resolvers
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse_yaml(text: str, source: str) -> tuple[yaml.Node, Any]:
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            raise SweepError(f"{source} is empty")
        _check_nodes(node, source)
        return node, yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SweepError(f"{source}: not valid YAML: {error}") from error
    except (ValueError, RecursionError, OverflowError) as error:  # such as the date 2024-13-99
        raise SweepError(f"{source}: not valid YAML: {error}") from error


def _check_nodes(root: yaml.Node, source: str) -> None:
    """Refuse doubled keys, and aliases that would expand without end."""
    waiting, count = [root], 0
    while waiting:
        node = waiting.pop()
        count += 1
        if count > MAX_NODES:
            raise _too_many()
        if isinstance(node, yaml.ScalarNode):
            _check_characters(node, source)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, child in node.value:
                if key.value in seen if isinstance(key.value, str) else False:
                    line = key.start_mark.line + 1
                    raise SweepError(f"{source}:{line}: the key {key.value!r} stands twice")
                seen.add(str(key.value))
                waiting += [key, child]
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)


def _check_characters(node: yaml.ScalarNode, source: str) -> None:
    """Names reach terminals, paths and logs: nothing in them may move a cursor or end a string."""
    for character in node.value:
        if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t":
            raise SweepError(
                f"{source}:{node.start_mark.line + 1}: {node.value[:80]!r} has the control "
                f"character U+{ord(character):04X}. Take it out"
            )


def _tell_mistakes(errors: Sequence[ErrorDetails], root: yaml.Node, source: str) -> list[str]:
    """A line for each mistake, in the file's order."""
    told: dict[tuple[int, str], None] = {}
    for error in errors:
        place, node = _locate(root, error["loc"])
        line = node.start_mark.line + 1
        told[line, f"{source}:{line}: {place or 'the file'}: {_explain(error)}"] = None
    return [message for _, message in sorted(told)]


def _locate(root: yaml.Node, loc: Sequence[int | str]) -> tuple[str, yaml.Node]:
    """Follow pydantic's location through the YAML: the path as text, and the deepest node.

    Pydantic also names union members, validators and the lists that a single value was wrapped
    in; what the file does not have is skipped.
    """
    path, node = "", root
    for step in loc:
        if isinstance(node, yaml.MappingNode):
            for key, child in node.value:
                if key.value == step:
                    path, node = (f"{path}.{step}" if path else str(step)), child
                    break
        elif (
            isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value)
        ):
            path, node = f"{path}[{step}]", node.value[step]
    return path, node


def _explain(error: ErrorDetails) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    name = str(error["loc"][-1]) if error["loc"] else ""
    shown = repr(value) if not isinstance(value, dict | list) else type(value).__name__
    if kind == "extra_forbidden":
        return f"unknown key {name!r}{_suggest(name, _known_keys(error['loc']))}"
    if kind == "missing":
        return f"the key {name!r} is missing"
    if kind == "union_tag_invalid":
        known = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        tag = str(context["tag"])
        return f"unknown {_axis(error['loc'])} {tag!r}{_suggest(tag, known)}"
    if kind == "union_tag_not_found":
        axis = _axis(error["loc"])
        article = "an" if axis[0] in "aeiou" else "a"
        return f"got {shown}; {article} {axis} is a name, or a mapping with `name` and its options"
    if kind == "literal_error":
        known = [
            tag.strip(" '") for tag in str(context["expected"]).replace(" or ", ",").split(",")
        ]
        return f"got {shown}{_suggest(str(value), known)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"got {shown}; a mapping was expected"
    if kind == "value_error":
        return f"{context['error']}"
    return f"got {shown}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _axis(loc: Sequence[int | str]) -> str:
    """The setting that a location is in, of those that are chosen by name."""
    return next(str(step) for step in reversed(loc) if step in ("method", "allocation"))


def _suggest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.lower(), known, n=1)
    hint = f". Did you mean {near[0]!r}?" if near and near[0] != word else "."
    return f"{hint} Known: {', '.join(sorted(known))}" if known else hint


def _known_keys(loc: Sequence[int | str]) -> list[str]:
    """The keys allowed where pydantic found one that is not."""
    model: Any = SweepSpec
    for step in loc[:-1]:
        fields = getattr(model, "model_fields", {})
        if step in fields:
            model = next(iter(_models_in(fields[step].annotation)), None)
        elif isinstance(step, str):
            tagged = [m for m in _NAMED if m.model_fields["name"].default == step]
            model = tagged[0] if tagged else model
    return sorted(getattr(model, "model_fields", {}))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


_NAMED: list[Any] = [*_models_in(MethodSpec), *_models_in(AllocationSpec)]
