"""The two things a child of the zygote does: run a candidate, or judge what a candidate answered. Never both.

The candidate's child loads the solution, evaluates the calls that the tests make (`max_of([1, 2])`) and reports their
values as plain data. It never sees what the tests expect. The judge's child never runs a line of the solution: it puts
the reported values where the calls stood and runs what is left of the tests. So a false report, however it was made,
passes only by holding the right values.
"""

from __future__ import annotations

import json
import sys
import types
from typing import Any

from archbench.sandbox.inside.values import NotPlain, TooLong, decode, encode

Message = dict[str, Any]

OUT_OF_MEMORY = b'{"failed": "memory"}'  # at hand, because making it might need memory
SHOWN = 100
"""Most characters of a candidate's own text (a value, an error) that a verdict repeats."""


def solve(request: Message) -> bytes:
    """Runs a candidate.

    request: `solution` and `setup`, source texts, run in this order in one namespace; `tests`, each with `imports`
        (source) and `asked` (expressions).
    Returns {"answers": [[encoded value, ...], ...]}, or {"failed": "error", "memory" or "length", "detail": ...}.
    """
    try:
        return json.dumps(_solve(request)).encode()
    except MemoryError:
        return OUT_OF_MEMORY


def _solve(request: Message) -> Message:
    module = types.ModuleType("solution")  # a real module: dataclasses look theirs up by name
    sys.modules["solution"] = module
    space = module.__dict__
    where = ""
    try:
        _run(request["solution"], space)
        where = "setup: "
        _run(request["setup"], space)
        answers = []
        for number, test in enumerate(request["tests"], start=1):
            where = f"test {number}: "
            _run(test["imports"], space)
            answers.append([encode(eval(_compiled(asked, "eval"), space)) for asked in test["asked"]])
        return {"answers": answers}
    except MemoryError:
        raise
    except TooLong:
        return {"failed": "length"}
    except NotPlain as error:
        return {"failed": "error", "detail": f"{where}got {error}, which is not plain data"}
    except BaseException as error:  # a candidate may raise anything, SystemExit too
        return {"failed": "error", "detail": where + described(error)}


def judge(request: Message) -> bytes:
    """Judges a report.

    request: `report`, the text a candidate's child wrote, perhaps forged; `setup`, source run first; `tests`, each with
        `imports` (source), `names` (of the answers) and `statement` (source, in which those names stand for calls).
    Returns {"passed": ..., "result": one line}.
    """
    result = _judged(request)
    return json.dumps({"passed": result == "passed", "result": result}).encode()


def _judged(request: Message) -> str:
    try:
        report = json.loads(request["report"])
        failed = report.get("failed")
        if failed is not None:
            detail = one_line(report["detail"]) if failed == "error" else ""
            return {"memory": "out of memory", "length": "output too long", "error": f"failed: {detail}"}[failed]
        values = [[decode(text) for text in answers] for answers in report["answers"]]
        if [len(answers) for answers in values] != [len(test["names"]) for test in request["tests"]]:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "failed: the report cannot be read"
    space: Message = {"__name__": "judge"}
    try:
        _run(request["setup"], space)
    except Exception as error:
        return f"failed: the tests' setup: {described(error)}"
    for number, (test, answers) in enumerate(zip(request["tests"], values, strict=True), start=1):
        try:
            _run(test["imports"], space)
            space.update(zip(test["names"], answers, strict=True))
            _run(test["statement"], space)
        except AssertionError:
            return f"failed: test {number}: got {', '.join(map(shown, answers))}"
        except Exception as error:
            return f"failed: test {number}: {described(error)}"
    return "passed"


def shown(value: Any) -> str:
    """A value as one short line."""
    try:
        return one_line(repr(value))
    except ValueError:  # an int of more digits than Python writes out
        return f"a long {type(value).__name__}"


def described(error: BaseException) -> str:
    """An exception as one short line. Its text may be made by the candidate's code, which may fail again."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    name = type(error).__name__
    return one_line(f"{name}: {text}" if text else name)


def one_line(text: str) -> str:
    """Printable ASCII without line ends, cut: what a candidate wrote must not reach a terminal as commands."""
    flat = " ".join(text[: 4 * SHOWN].encode("ascii", "backslashreplace").decode().split())
    flat = "".join(letter if letter.isprintable() else "?" for letter in flat)
    return flat if len(flat) <= SHOWN else flat[: SHOWN - 3] + "..."


def _run(source: str, space: Message) -> None:
    exec(_compiled(source, "exec"), space)


def _compiled(source: str, mode: str) -> Any:
    # dont_inherit: this file's own __future__ import must not change the meaning of the candidate's code.
    return compile(source, "<solution>", mode, dont_inherit=True)


ROLES = {"solve": solve, "judge": judge}
