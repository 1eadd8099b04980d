"""Reads recipes and targets from YAML, applies ``--set`` overrides, and explains what is wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from jetway.configs.schema import Fallback, Recipe, Target
from jetway.tasks.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

PACKAGED = Path(__file__).parent
MAX_FILE_BYTES = 1 << 20
#: Chooses every target of the project.
ALL = "all"


def load_recipe(
    name_or_path: str, overrides: Sequence[str] = (), *, near: Path | None = None
) -> tuple[Recipe, Path]:
    """The recipe, validated with the overrides applied, and the file it came from.

    ``name_or_path`` is a YAML file, or the name of a recipe in ``configs/recipes``; ``near`` is a recipe's file, beside
    which it may lie.
    Raises ConfigError with the file, the key, the value, what is allowed and the nearest valid key.
    """
    path = find_file(name_or_path, "recipes", [Path.cwd(), *([near.parent] if near else [])])
    values = read_recipe(path)
    for override in overrides:
        apply_override(values, override)
    recipe = validate(Recipe, values, source=str(path))
    fallback_recipes(recipe, source=str(path))
    return recipe, path


def fallback_recipes(recipe: Recipe, *, source: str = "recipe") -> dict[str, Recipe]:
    """What each fallback of ``plan_b`` makes of the recipe, by its name, in their order.

    Raises ConfigError for overrides that make no valid recipe, naming the fallback.
    """
    fallbacks = recipe.plan_b.fallbacks if recipe.plan_b else ()
    return {one.name: _with_fallback(recipe, one, f"{source}, plan_b {one.name},") for one in fallbacks}


def _with_fallback(recipe: Recipe, fallback: Fallback, source: str) -> Recipe:
    values = recipe.model_dump(mode="json", exclude_unset=True, exclude={"plan_b"})
    for key, value in fallback.overrides.items():
        set_key(values, key, value, source=source)
    return validate(Recipe, values, source=source)


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe's file, beside those of the recipe that it ``extends``; its own sections win as a whole.

    Raises ConfigError for one that extends a recipe which extends another.
    """
    values = read_yaml(path)
    base = values.pop("extends", None)
    if base is None:
        return values
    inherited = read_yaml(find_file(str(base), "recipes", [Path.cwd(), path.parent]))
    if "extends" in inherited:
        raise ConfigError(f"{path}: {base!r} extends another recipe itself. Extend that one instead.")
    return inherited | values


def load_target(name_or_path: str, *, near: Path | None = None) -> Target:
    """The target of that name or file; ``near`` is the recipe's file, beside which targets may lie.

    Raises ConfigError when there is none, it is not valid, or a file found by name calls itself otherwise.
    """
    path = find_file(name_or_path, "targets", _folders(near))
    target = validate(Target, read_yaml(path), source=str(path))
    if path.stem == name_or_path != target.name:
        raise ConfigError(
            f"{path}: its name is {target.name!r}, but the file is called {name_or_path!r}. Make them the same."
        )
    return target


def check_one_each(recipes: Iterable[tuple[str, Recipe]]) -> None:
    """Raises ConfigError for two recipes of one name, as champions go by it; each beside its choice."""
    given: dict[str, str] = {}
    for choice, recipe in recipes:
        if recipe.name in given:
            raise ConfigError(
                f"{given[recipe.name]!r} and {choice!r} are both the recipe {recipe.name!r}. Name each recipe "
                "once, and give every recipe file a name of its own."
            )
        given[recipe.name] = choice


def load_targets(choices: Sequence[str], *, near: Path | None = None) -> list[Target]:
    """The targets of those names and files, those that selectors of labels (``class=orin,site=lab``) fit, or ``all``.

    A target that is both named and selected counts once. Raises ConfigError also when two that are named have one
    name, and when a selector fits none.
    """
    given: dict[str, str] = {}
    targets: dict[str, Target] = {}
    for choice in choices:
        if choice == ALL or ("=" in choice and not Path(choice).is_file()):
            targets = {target.name: target for target in select_targets(choice, near=near)} | targets
            continue
        target = load_target(choice, near=near)
        if target.name in given:
            raise ConfigError(
                f"{given[target.name]!r} and {choice!r} are both the target {target.name!r}. Name each target "
                "once, and give every target file a name of its own."
            )
        given[target.name], targets[target.name] = choice, target
    return list(targets.values())


def select_targets(selector: str, *, near: Path | None = None) -> list[Target]:
    """The project's own targets that have every label of ``class=orin,site=lab``, by name; ``all`` is all of them.

    Raises ConfigError when none has, with the labels that there are.
    """
    own = [load_target(name, near=near) for name in _own_names("targets", _folders(near))]
    wanted = [] if selector == ALL else [_label(part, selector) for part in selector.split(",")]
    chosen = [target for target in own if all(target.labels.get(key) == value for key, value in wanted)]
    if not chosen:
        raise ConfigError(f"--target {selector}: no target of this project fits. {_labels_in_use(own)}")
    return chosen


def _label(part: str, selector: str) -> tuple[str, str]:
    key, _, value = (word.strip() for word in part.partition("="))
    if not key or not value:
        raise ConfigError(
            f"--target {selector}: {part!r} is no label. Write class=orin, and class=orin,site=lab for both."
        )
    return key, value


def _labels_in_use(targets: Iterable[Target]) -> str:
    """Every label that some target has, and which ones have it."""
    having: dict[str, list[str]] = {}
    for target in targets:
        for key, value in target.labels.items():
            having.setdefault(f"{key}={value}", []).append(target.name)
    told = "; ".join(f"{label} ({', '.join(names)})" for label, names in sorted(having.items()))
    names = ", ".join(target.name for target in targets) or "none"
    return f"Labels in use: {told or 'none'}. Targets: {names}."


def _folders(near: Path | None) -> list[Path]:
    """Where targets may lie: here, and beside or above a recipe of the project."""
    beside = near is not None and PACKAGED not in near.parents
    return [Path.cwd(), *([near.parent, near.parent.parent] if near and beside else [])]


def find_file(name_or_path: str, kind: str, folders: Iterable[Path]) -> Path:
    """A path as given, or NAME.yaml in ``kind`` or ``configs/kind`` of the folders, or Jetway's own."""
    if not name_or_path or "\0" in name_or_path or len(name_or_path) > 1024:
        raise ConfigError(f"{name_or_path[:80]!r} names no file in {kind}.")
    given = Path(name_or_path)
    if given.suffix in {".yaml", ".yml"} or given.is_file():
        if given.is_file():
            return given.absolute()
        raise ConfigError(f"{given}: no such file. Check the path; known names: {_known(kind, folders)}.")
    for folder in _places(kind, folders):
        candidate = folder / f"{name_or_path}.yaml"
        if given.name == name_or_path and candidate.is_file():
            return candidate
    raise ConfigError(
        f"No file called {name_or_path!r} in {kind}.{_nearest(name_or_path, _names(kind, folders))} "
        f"Known names: {_known(kind, folders)}. A path that ends in .yaml works too."
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError with the line of a syntax error or a doubled key."""
    try:
        text = path.read_bytes()[: MAX_FILE_BYTES + 1].decode("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({exc}).") from exc
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; this is not a Jetway file.")
    return _mapping(parse_yaml(text, str(path)), str(path))


def parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as exc:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(exc).split())}") from exc


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one dotted key: ``qat.epochs=3``. The value is YAML and is validated with the rest."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: write it as key=value, for example --set qat.epochs=3.")
    set_key(values, key, parse_yaml(text, f"--set {override!r}"), source=f"--set {override!r}:")


def set_key(values: dict[str, Any], key: str, value: Any, *, source: str) -> None:
    """Sets a dotted key of nested mappings, in place."""
    node = values
    *parents, last = key.strip().split(".")
    for parent in parents:
        child = node.get(parent)
        if child is not None and not isinstance(child, dict):
            raise ConfigError(f"{source} {parent!r} holds {child!r}, which has no keys below it.")
        node[parent] = dict(child or {})
        node = node[parent]
    node[last] = value


def validate(model: type[Model], values: Mapping[str, Any], *, source: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as exc:
        problems = "\n".join(f"  {_explain(model, error)}" for error in exc.errors())
        raise ConfigError(f"{source} is not a valid {model.__name__.lower()}:\n{problems}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{source}: nested too deeply.") from exc


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses the same key twice and aliases, which only obscure a recipe."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not supported{self.peek_event().start_mark}")  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} stands there twice{key_node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _mapping(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{source}: a mapping of keys was expected at the top, such as 'name: digits'.")
    return value


def _explain(model: type[BaseModel], error: Any) -> str:
    """One line for one pydantic error: key, value, what is allowed, nearest valid key."""
    loc = [part for part in error["loc"] if not _is_union_tag(part)]
    key = ".".join(str(part) for part in loc) or "(top)"
    if error["type"] == "extra_forbidden":
        fields = _fields_at(model, loc[:-1])
        return f"{key}: unknown key.{_nearest(str(loc[-1]), fields)} Allowed here: {', '.join(fields)}"
    if error["type"] == "missing":
        return f"{key}: missing. Add it: {_description_at(model, loc)}"
    if error["type"] in ("model_type", "model_attributes_type"):
        keys = ", ".join(_fields_at(model, loc))
        return f"{key}: {_short(error['input'])} is not allowed: write a section with any of its keys: {keys}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return (
        f"{key}: {_short(error['input'])} is not allowed: {message}. {_description_at(model, loc)}".rstrip()
    )


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part[:1].isupper() or part.startswith("constrained-"))


def _model_at(model: type[BaseModel], loc: Sequence[Any]) -> type[BaseModel] | None:
    current: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int) or current is None:
            continue
        field = current.model_fields.get(str(part))
        current = _inner_model(field.annotation) if field else None
    return current


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _inner_model(arg))), None)


def _fields_at(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    found = _model_at(model, loc)
    return sorted(found.model_fields) if found else []


def _description_at(model: type[BaseModel], loc: Sequence[Any]) -> str:
    names = [part for part in loc if isinstance(part, str)]
    parent = _model_at(model, names[:-1]) if names else None
    field = parent.model_fields.get(names[-1]) if parent else None
    return (field.description or "") if field else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(word: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _places(kind: str, folders: Iterable[Path]) -> list[Path]:
    local = [place for folder in folders for place in (folder / "configs" / kind, folder / kind, folder)]
    return [*local, PACKAGED / kind]


def _names(kind: str, folders: Iterable[Path]) -> list[str]:
    return _stems(place for place in _places(kind, folders) if place.name == kind)


def _own_names(kind: str, folders: Iterable[Path]) -> list[str]:
    """Without those that come with Jetway."""
    return _stems(place for folder in folders for place in (folder / "configs" / kind, folder / kind))


def _stems(places: Iterable[Path]) -> list[str]:
    return sorted({path.stem for place in places for path in place.glob("*.yaml")})


def _known(kind: str, folders: Iterable[Path]) -> str:
    return ", ".join(_names(kind, folders)) or "none"
