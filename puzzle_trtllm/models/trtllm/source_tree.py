"""The table held against TensorRT-LLM's source as files: nothing is imported, no GPU and no installation is needed.

    tree = SourceTree("TensorRT-LLM")           a checkout, or the package folder of a wheel
    findings = [tree.check(row) for row in REQUIREMENTS]

The files are parsed. A name that a module only imports, or only sets to another name, is followed to the class or
function that it stands for, and a class carries the source and the methods of its bases in the same package, as
`symbols.check` sees them on an installed one. What is made when a module runs (a name that `__getattr__` of a package
serves) cannot be seen here; such rows name the defining module as their last candidate.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.models.trtllm.symbols import Finding, mention_problems, parameter_problems
from puzzle_trtllm.models.trtllm.upstream import Requirement
from puzzle_trtllm.plain_file import read_text

PACKAGE = "tensorrt_llm"
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class SourceTree:
    """A folder with TensorRT-LLM's Python files; some may be missing."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigError when the folder is not one of TensorRT-LLM."""
        folder = Path(folder)
        root = folder.parent if folder.name == PACKAGE else folder
        if not (root / PACKAGE).is_dir():
            raise ConfigError("no source of TensorRT-LLM", file=folder, expected=f"a folder that holds {PACKAGE}/")
        self.root = root
        self._modules: dict[str, _Module | None] = {}

    @cached_property
    def version(self) -> str | None:
        """`__version__` of tensorrt_llm/version.py."""
        file = self.root / PACKAGE / "version.py"
        match = re.search(r'__version__ *= *"([^"]+)"', read_text(file, ConfigError)) if file.is_file() else None
        return match[1] if match else None

    def check(self, requirement: Requirement) -> Finding:
        """Check one row; never raises for what the files hold."""
        problems = []
        for name in requirement.modules:
            if not requirement.path:
                whole = self._module(name)
                if whole is not None:
                    problems = mention_problems(requirement, whole.text)
                    return Finding(requirement=requirement, module=name, problems=tuple(problems))
                problems.append(f"{name}: no such file")
                continue
            found = self._find(name, requirement.path)
            if isinstance(found, str):
                problems.append(found)
                continue
            module, definition = found
            problems = []
            if requirement.parameters:
                problems += parameter_problems(requirement, self._parameters(module, definition))
            if requirement.mentions:
                text = "\n".join(self._texts(module, definition, set()))
                problems += mention_problems(requirement, text)
            return Finding(requirement=requirement, module=module.name, problems=tuple(problems))
        return Finding(requirement=requirement, module=None, problems=tuple(problems))

    def fields(self, module: str, class_name: str) -> set[str] | None:
        """Annotated fields of a class and its bases (pydantic models); None when the class is not there."""
        found = self._find(module, class_name)
        if isinstance(found, str):
            return None
        return set(self._fields(*found, set()))

    def file_of(self, module: str) -> Path | None:
        """Where a module of the package lies."""
        path = self.root / Path(*module.split("."))
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)

    # --- finding ----------------------------------------------------------------------------------------------------

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            file = self.file_of(name)
            self._modules[name] = None if file is None else _Module(name, file)
        return self._modules[name]

    def _find(self, module_name: str, path: str) -> tuple[_Module, _Definition] | str:
        """The definition behind `module.path`, or why there is none."""
        module = self._module(module_name)
        if module is None:
            return f"{module_name}: no such file"
        head, *rest = path.split(".")
        found = self._resolve(module, head, set())
        for part in rest:
            found = None if found is None else self._member(*found, part, set())
        return f"{module_name}.{path}: not defined" if found is None else found

    def _resolve(self, module: _Module, name: str, seen: set[str]) -> tuple[_Module, _Definition] | None:
        """A name as a module knows it: defined there, another name for it, or imported from the package."""
        if f"{module.name}:{name}" in seen:
            return None
        seen.add(f"{module.name}:{name}")
        if name in module.definitions:
            return module, module.definitions[name]
        origins = [module.imports[name]] if name in module.imports else []
        for origin, original in [*origins, *((star, name) for star in module.star_imports)]:
            source = self._module(origin)
            found = None if source is None else self._resolve(source, original, seen)
            if found is not None:
                return found
        alias = module.aliases.get(name)
        return None if alias is None else self._resolve(module, alias, seen)

    def _bases(self, module: _Module, definition: _Definition) -> Iterator[tuple[_Module, _Definition]]:
        for base in definition.bases if isinstance(definition, ast.ClassDef) else ():
            named = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(named, ast.Name):
                found = self._resolve(module, named.id, set())
                if found is not None:
                    yield found

    def _member(
        self, module: _Module, definition: _Definition, name: str, seen: set[int]
    ) -> tuple[_Module, _Definition] | None:
        """A method or inner class, the class's own or inherited."""
        if id(definition) in seen:
            return None
        seen.add(id(definition))
        for node in definition.body:
            if isinstance(node, _Definition) and node.name == name:
                return module, node
        inherited = (self._member(*base, name, seen) for base in self._bases(module, definition))
        return next((found for found in inherited if found is not None), None)

    # --- what a definition says -------------------------------------------------------------------------------------

    def _parameters(self, module: _Module, definition: _Definition) -> list[str]:
        if isinstance(definition, ast.ClassDef):
            initializer = self._member(module, definition, "__init__", set())
            return [] if initializer is None else self._parameters(*initializer)
        arguments = definition.args
        variadic = [given for given in (arguments.vararg, arguments.kwarg) if given is not None]
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variadic]
        return [argument.arg for argument in named]

    def _texts(self, module: _Module, definition: _Definition, seen: set[int]) -> Iterator[str]:
        if id(definition) in seen:
            return
        seen.add(id(definition))
        yield ast.get_source_segment(module.text, definition) or ""
        for base in self._bases(module, definition):
            yield from self._texts(*base, seen)

    def _fields(self, module: _Module, definition: _Definition, seen: set[int]) -> Iterator[str]:
        if id(definition) in seen:
            return
        seen.add(id(definition))
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id
        for base in self._bases(module, definition):
            yield from self._fields(*base, seen)


class _Module:
    """One parsed file: what it defines at top level, and where its imported names come from."""

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self.text = read_text(file, ConfigError)
        self._package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        try:
            tree = ast.parse(self.text)
        except (SyntaxError, ValueError, RecursionError) as error:  # ValueError: zero bytes
            raise ConfigError(f"not Python that this interpreter reads: {error}", file=file) from None
        self.definitions: dict[str, _Definition] = {}
        self.aliases: dict[str, str] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        self.star_imports: list[str] = []
        for node in _top_level(tree.body):
            if isinstance(node, _Definition):
                self.definitions[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                self._note_import(node)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
                self.aliases |= {target.id: node.value.id for target in node.targets if isinstance(target, ast.Name)}

    def _note_import(self, node: ast.ImportFrom) -> None:
        package = self._package
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        origin = node.module or "" if node.level == 0 else ".".join(filter(None, (package, node.module)))
        for alias in node.names:
            if alias.name == "*":
                self.star_imports.append(origin)
            else:
                self.imports[alias.asname or alias.name] = (origin, alias.name)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, also those under `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _top_level([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            handlers = [statement for handler in node.handlers for statement in handler.body]
            yield from _top_level([*node.body, *handlers, *node.orelse, *node.finalbody])
