"""A problem's tests, taken apart: what the candidate is asked, and what the judge does with the answers.

    assert sorted(find(3), key=len) == ["a", "bc"]
        asked of the candidate:   find(3)
        left to the judge:        assert sorted(_answer_0, key=len) == ["a", "bc"]

What a name of the candidate's is follows from the reference solution: what it defines at its top level, and what the
setup makes with that. The longest expression that begins with such a name is asked: a call with its arguments, and
whatever is taken of the result (`find(3).left`). So the expected values never enter the candidate's process, and no
object of its making enters the judge's. All 2,938 tests of MBPP come apart this way.
"""

from __future__ import annotations

import ast
import builtins
import warnings
from dataclasses import dataclass
from functools import lru_cache

from archbench.data.problems import Problem
from archbench.errors import DataError

ANSWER = "_answer_"
IMPORTS = (ast.Import, ast.ImportFrom)
SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Question:
    """One test. imports: source both sides run first. asked: expressions. statement: source for the judge, in which
    the names `names` stand for the answers."""

    imports: str
    asked: tuple[str, ...]
    names: tuple[str, ...]
    statement: str


@dataclass(frozen=True)
class Questions:
    """A problem's tests. Each side's setup is source that it runs before the first one: the problem's own goes to the
    candidate where its calls need it, and to the judge where it does not need the candidate."""

    candidate_setup: str
    judge_setup: str
    tests: tuple[Question, ...]


@lru_cache(maxsize=4096)
def take_apart(problem: Problem, challenge: bool = False) -> Questions:
    """The tests of a problem, and with `challenge` its challenge tests after them. For one thread at a time.

    Raises:
        DataError: some source is not Python, or a test cannot be taken apart: it uses the solution within a lambda, a
            comprehension or a compound statement, not at all, or uses a name that nothing defines.
    """
    reference = _parsed(problem, "code", problem.code)
    setup = _parsed(problem, "test_setup_code", problem.test_setup_code)
    theirs = _bound(reference.body, imports=False)
    if _names(setup) & theirs:
        theirs |= _bound(setup.body, imports=False)
    known = set(dir(builtins)) | _bound(reference.body) | _bound(setup.body)
    tests = [("test_list", n, text) for n, text in enumerate(problem.test_list, start=1)]
    if challenge:
        tests += [("challenge_test_list", n, text) for n, text in enumerate(problem.challenge_test_list, start=1)]
    questions = tuple(_question(problem, f"{field}: test {n}", text, theirs, known) for field, n, text in tests)
    if not questions:
        raise DataError(f"task {problem.task_id}: test_list: there is no test")
    used = {name for question in questions for name in _names(ast.parse(question.statement))}
    borrowed = [node for node in reference.body if isinstance(node, IMPORTS) and _bound([node]) & used]
    used_by_them = {name for question in questions for text in question.asked for name in _names(ast.parse(text))}
    uses_theirs = bool(_names(setup) & theirs)
    to_candidate = uses_theirs or bool(_bound(setup.body) & used_by_them)
    to_judge = [] if uses_theirs else [problem.test_setup_code]
    return Questions(
        candidate_setup=problem.test_setup_code if to_candidate else "",
        judge_setup="\n".join([*map(ast.unparse, borrowed), *to_judge]),
        tests=questions,
    )


def _question(problem: Problem, where: str, text: str, theirs: set[str], known: set[str]) -> Question:
    where = f"task {problem.task_id}: {where}"
    tree = _parsed(problem, where, text)
    imports: list[ast.stmt] = []
    rest: list[ast.stmt] = []
    for statement in tree.body:
        if isinstance(statement, IMPORTS):
            imports.append(statement)
        elif isinstance(statement, ast.Assert) or _sets_a_name(statement):
            rest.append(statement)
        else:
            raise DataError(f"{where}: found '{type(statement).__name__}'; allowed: assert, import, NAME = VALUE")
    own = _bound(tree.body)
    if unknown := _names(tree) - known - own - _inner(tree):
        raise DataError(f"{where}: uses {', '.join(sorted(unknown))}, which the reference solution does not define")
    separate = _Separate(where, theirs - own, _bound([node for node in rest if isinstance(node, ast.Assign)]))
    rewritten = [separate.visit(statement) for statement in rest]
    if not separate.asked:
        raise DataError(f"{where}: does not use what the reference solution defines ({', '.join(sorted(theirs))})")
    return Question(
        imports="\n".join(map(ast.unparse, imports)),
        asked=tuple(map(ast.unparse, separate.asked)),
        names=tuple(f"{ANSWER}{number}" for number in range(len(separate.asked))),
        statement="\n".join(ast.unparse(ast.fix_missing_locations(statement)) for statement in rewritten),
    )


class _Separate(ast.NodeTransformer):
    """Puts a name in place of every expression that begins with a name of the candidate's, and collects those."""

    def __init__(self, where: str, theirs: set[str], local: set[str]) -> None:
        self.where, self.theirs, self.local = where, theirs, local
        self.asked: list[ast.expr] = []

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.expr) and _root(node) in self.theirs:
            if held := _names(node) & self.local:
                raise DataError(f"{self.where}: asks the solution about {', '.join(sorted(held))}, which the test sets")
            self.asked.append(node)
            return ast.Name(f"{ANSWER}{len(self.asked) - 1}", ast.Load())
        if isinstance(node, SCOPES) and _names(node) & self.theirs:
            raise DataError(f"{self.where}: uses the solution within a lambda or comprehension, which is not judged")
        return self.generic_visit(node)


def _root(node: ast.expr) -> str | None:
    """The name that a chain of calls, attributes and subscripts begins with."""
    while True:
        if isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        else:
            return node.id if isinstance(node, ast.Name) else None


def _sets_a_name(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and all(isinstance(target, ast.Name) for target in statement.targets)


def _names(tree: ast.AST) -> set[str]:
    """Every name the code reads or writes."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _inner(tree: ast.AST) -> set[str]:
    """Names bound within lambdas and comprehensions."""
    return {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} | _stored(tree)


def _stored(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _bound(body: list[ast.stmt], imports: bool = True) -> set[str]:
    """Names that statements bind at their own level: definitions, assignments, and imports unless left out."""
    bound = set()
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(statement.name)
        elif isinstance(statement, IMPORTS):
            if imports:
                bound |= {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
        else:
            bound |= _stored(statement)
    return bound


def _parsed(problem: Problem, where: str, text: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dubious escapes, which references hold many of
            return ast.parse(text.replace("\r\n", "\n"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = where if where.startswith("task") else f"task {problem.task_id}: {where}"
        raise DataError(f"{where}: not Python ({error})") from None
