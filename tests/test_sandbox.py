"""The sandbox: right programs pass, wrong and hostile ones do not, and nothing outside is touched."""

import itertools
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import hostile
import pytest

from archbench.data.problems import Problem, read_problems
from archbench.errors import DataError, SandboxError
from archbench.sandbox import Limits, Sandbox, SandboxWarning, ladder, open_sandbox
from archbench.sandbox.inside import seccomp, values
from archbench.sandbox.questions import take_apart

TIGHT = Limits(cpu_s=1, wall_s=3.0, memory_bytes=256 << 20)


@pytest.fixture(scope="module", params=ladder.CONFINED)
def rung(request):
    if reason := ladder.why_not(request.param):
        pytest.skip(f"sandbox '{request.param}': {reason}")
    return request.param


@pytest.fixture(scope="module")
def sandbox(rung):
    with open_sandbox(rung) as opened:
        yield opened


@pytest.fixture(scope="module")
def tight(rung):
    with open_sandbox(rung, TIGHT) as opened:
        yield opened


def problem(*tests, code="def f(*_): pass", **more):
    return Problem(task_id=1, text="", code=code, test_list=tests, **more)


# The outside world, and that it stays as it was


@dataclass
class World:
    """Things outside: a file that holds the token, its folder, sockets that listen, a process that sleeps."""

    folder: Path
    network: socket.socket
    local: socket.socket
    victim: subprocess.Popen
    token: str

    @property
    def file(self):
        return self.folder / "file"

    def state(self):
        about = self.file.stat()
        attributes = os.listxattr(self.file)
        limits = (Path(f"/proc/{self.victim.pid}/limits").read_text(), os.getpriority(os.PRIO_PROCESS, self.victim.pid))
        return (
            *(about.st_mode, about.st_uid, about.st_mtime_ns, about.st_nlink, self.file.read_text(), attributes),
            *(sorted(path.name for path in self.folder.iterdir()), self.victim.poll(), *limits),
        )

    def program(self, name):
        return hostile.PROGRAMS[name].format(
            file=self.file,
            folder=self.folder,
            port=self.network.getsockname()[1],
            socket=self.folder / "socket",
            process=os.getpid(),
            victim=self.victim.pid,
        )

    def problem(self):
        return problem(
            f"assert secret(1) == {self.token!r}",
            f"assert secret(2) == {self.token + '!'!r}",
            code="def secret(n): pass",
        )

    def nobody_called(self):
        for listener in (self.network, self.local):
            with pytest.raises(BlockingIOError):
                listener.accept()
        return True


@pytest.fixture
def world(tmp_path, monkeypatch):
    token = f"TOKEN-{secrets.token_hex(8)}"
    monkeypatch.setenv("ARCHBENCH_SECRET", token)
    (tmp_path / "file").write_text(token)
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", token])
    local = socket.socket(socket.AF_UNIX)
    folder = os.getcwd()
    os.chdir(tmp_path)  # a unix socket's path may not be long
    local.bind("socket")
    os.chdir(folder)
    local.listen()
    network = socket.create_server(("127.0.0.1", 0))
    for listener in (local, network):
        listener.setblocking(False)
    yield World(tmp_path, network, local, victim, token)
    victim.kill()
    victim.wait()
    network.close()
    local.close()


@pytest.mark.parametrize("name", hostile.PROGRAMS)
def test_hostile_programs_neither_pass_nor_get_out(tight, world, name):
    before = world.state()
    verdict = tight.judge(world.program(name), world.problem())
    assert not verdict.passed
    assert verdict.result != "passed"
    assert verdict.result.isprintable() and verdict.result.isascii()
    assert len(verdict.result) < 200
    assert world.state() == before
    assert world.nobody_called()
    honest = f"def secret(n): return {world.token!r} + '!' * (n - 1)"
    assert tight.judge(honest, world.problem()).passed, "the sandbox does not work any more"


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("exits the process", "exited early (code 0)"),
        ("exits by exception", "failed: SystemExit: 0"),
        ("returns what equals everything", "failed: test 1: got an Equal, which is not plain data"),
        ("returns a text that equals everything", "failed: test 1: got 'wrong'"),
        ("takes ten gigabytes", "out of memory"),
        ("takes gigabytes bit by bit", "out of memory"),
        ("loops", "timed out"),
        ("loops in threads", "timed out"),
        ("sleeps", "timed out"),
        ("writes reports without end", "output too long"),
        ("returns a list of itself", "failed: test 1: got nested too deep, which is not plain data"),
        ("reports that it failed by passing", "failed: ?[2Jpassed"),
        ("connects", "failed: PermissionError: [Errno 1] Operation not permitted"),
        ("reads the tests from disk", "failed: test 1: "),
        ("reports no answers", "failed: the report cannot be read"),
    ],
)
def test_verdicts_say_what_happened(tight, world, name, result):
    verdict = tight.judge(world.program(name), world.problem())
    assert verdict.result.startswith(result)
    assert verdict.rung == tight.rung


def test_colliding_hashes_cost_the_judge_no_more_than_its_limit(tight):
    answers = "def f(): return [i * (2**61 - 1) for i in range(30_000)]"
    begin = time.monotonic()
    verdict = tight.judge(answers, problem("assert set(f()) == {0}"))
    assert not verdict.passed
    assert time.monotonic() - begin < 15


def test_nothing_of_one_task_is_left_for_the_next(rung):
    """One zygote serves both: what the judge of the first was told is not in the memory of the second."""
    token = f"TOKEN-{secrets.token_hex(8)}"
    search = hostile.PROGRAMS["searches every object"].format()
    asked = problem(f"assert secret(1) == {token!r}", code="def secret(n): pass")
    with open_sandbox(rung, TIGHT) as opened:
        for _ in range(3):
            opened.judge("def secret(n): return 'no'", asked)
        assert not opened.judge(search, asked).passed
        scan = hostile.PROGRAMS["searches memory"].format().replace("0x100000)", "0x80000)")
        for _ in range(3):
            assert not opened.judge(scan, asked).passed


def test_M18_an_endless_loop_a_fork_bomb_and_a_network_attempt_end(tight, world):  # noqa: N802
    for name in ("loops", "bombs with forks", "connects"):
        begin = time.monotonic()
        assert not tight.judge(world.program(name), world.problem()).passed
        assert time.monotonic() - begin < 4 * TIGHT.wall_s
    assert world.nobody_called()


# Programs that are right


@pytest.mark.parametrize(
    ("value", "test"),
    [
        ("1", "assert f() == 1.0"),
        ("True", "assert f() == 1"),
        ("0.1 + 0.2", "assert f() == 0.30000000000000004"),
        ("float('inf')", "assert f() > 1e308"),
        ("-0.0", "assert str(f()) == '-0.0'"),
        ("3 + 4j", "assert abs(f()) == 5"),
        ("10 ** 5000", "assert f() == 10 ** 5000"),
        ("(1, [2, {'a': {3}}], None)", "assert f() == (1, [2, {'a': {3}}], None)"),
        ("{(1, 2): frozenset([3])}", "assert f() == {(1, 2): frozenset([3])}"),
        ("b'x\\xff'", "assert f() == b'x\\xff'"),
        ("'\\ud800\\n\\u00e9'", "assert f() == '\\ud800\\n\\u00e9'"),
        ("__import__('collections').Counter('aab')", "assert f() == {'a': 2, 'b': 1}"),
        ("__import__('collections').defaultdict(list, a=[1])", "assert f() == {'a': [1]}"),
        ("__import__('collections').namedtuple('P', 'x y')(1, 2)", "assert f() == (1, 2)"),
        ("'35'", "assert int(f()) == 35"),
        ("[3, 1]", "assert sorted(f()) == [1, 3]"),
        ("0", "assert not f()"),
        ("None", "assert f() is None"),
        ("3.0000001", "import math\nassert math.isclose(f(), 3, rel_tol=1e-3)"),
        ("[1, 2]", "assert f()[0] == 1 and f()[-1] == 2"),
        ("[1, 2]", "assert all(x in (1, 2) for x in f()) if False else len(f()) == 2"),
        ("2", "expected = {1: 2}\nassert f() == expected[1]"),
    ],
)
def test_equality_is_pythons(sandbox, value, test):
    if "for x in f()" in test:
        with pytest.raises(DataError, match="comprehension"):
            take_apart(problem(test, code="def f(): pass"))
        return
    verdict = sandbox.judge(f"def f(): return {value}", problem(test, code="def f(): pass"))
    assert verdict.result == "passed"


@pytest.mark.parametrize(
    ("value", "test", "result"),
    [
        ("(1, 2)", "assert f() == [1, 2]", "failed: test 1: got (1, 2)"),
        ("float('nan')", "assert f() == float('nan')", "failed: test 1: got nan"),
        ("0.3", "assert f() == 0.1 + 0.2", "failed: test 1: got 0.3"),
        ("'a'", "assert f() + 1 == 2", "failed: test 1: TypeError: "),
        ("(x for x in [1])", "assert f() == 1", "failed: test 1: got a generator, which is not plain data"),
        ("g()", "assert f() == 1", "failed: test 1: NameError: name 'g' is not defined"),
    ],
)
def test_wrong_answers_are_named(sandbox, value, test, result):
    assert sandbox.judge(f"def f(): return {value}", problem(test, code="def f(): pass")).result.startswith(result)


def test_solutions_may_use_what_honest_programs_use(sandbox):
    solution = """
from __future__ import annotations
import dataclasses, threading, decimal, colorsys, tempfile
print("loading")
@dataclasses.dataclass
class Point:
    x: int
if __name__ == "__main__":
    raise SystemExit
def f(x):
    found = []
    thread = threading.Thread(target=lambda: found.append(Point(x).x))
    thread.start(); thread.join()
    return found[0] + int(decimal.Decimal("0.5") * 2)
"""
    assert sandbox.judge(solution, problem("assert f(1) == 2")).result == "passed"


def test_setup_runs_after_the_solution_whose_classes_it_uses(sandbox):
    code = "class Node:\n    def __init__(self, x): self.x = x\ndef f(node): return node.x"
    assert sandbox.judge(code, problem("assert f(root) == 5", code=code, test_setup_code="root = Node(5)")).passed


def test_setup_without_the_solution_serves_the_judge_too(sandbox):
    asked = problem("assert f(n) == 3", test_setup_code="n = 2", code="def f(n): pass")
    assert sandbox.judge("def f(n): return n + 1", asked).passed
    asked = problem("assert f(2) == m", test_setup_code="m = 3", code="def f(n): pass")
    assert sandbox.judge("def f(n): return n + 1", asked).passed
    assert not sandbox.judge("m = 7\ndef f(n): return m", asked).passed, "the candidate is not told what is expected"


def test_line_ends_of_windows_are_read_as_lines(sandbox):
    assert sandbox.judge('def f():\r\n    return """a\r\nb"""\r\n', problem("assert f() == 'a\\nb'")).passed


def test_challenge_tests_count_only_when_asked(sandbox):
    asked = problem("assert f(1) == 1", challenge_test_list=("assert f(2) == 4",))
    assert sandbox.judge("def f(x): return 1", asked).passed
    assert sandbox.judge("def f(x): return 1", asked, challenge=True).result == "failed: test 2: got 1"


def test_verdicts_do_not_depend_on_the_run(rung):
    """Sets iterate alike and `random` draws alike in every process."""
    source = "import random\ndef f(): return [*{'a', 'b', 'c', 'd', 'e'}, random.random()]"
    results = set()
    for _ in range(2):
        with open_sandbox(rung) as opened:
            results |= {opened.judge(source, problem("assert f() == 0")).result for _ in range(2)}
    assert len(results) == 1


def test_many_are_judged_in_order(sandbox):
    items = [(f"def f(): return {n}", problem(f"assert f() == {n - n % 2}")) for n in range(12)]
    heard = []
    verdicts = sandbox.judge_all(items, workers=2, notify=heard.append)
    assert [verdict.passed for verdict in verdicts] == [True, False] * 6
    assert heard == list(range(1, 13))


# The tests, taken apart


@pytest.mark.parametrize(
    ("test", "asked", "statement"),
    [
        ("assert f(1)(2) == 3", ("f(1)(2)",), "assert _answer_0 == 3"),
        ("assert f(g(1), 2) == 3", ("f(g(1), 2)",), "assert _answer_0 == 3"),
        ("assert set(f(1)) | set(g(2)) == {3}", ("f(1)", "g(2)"), "assert set(_answer_0) | set(_answer_1) == {3}"),
        ("assert f(x=[i for i in range(3)]).real == 3", ("f(x=[i for i in range(3)]).real",), "assert _answer_0 == 3"),
        ("assert LIMIT == 3, 'no'", ("LIMIT",), "assert _answer_0 == 3, 'no'"),
    ],
)
def test_calls_are_taken_out_of_tests(test, asked, statement):
    (question,) = take_apart(problem(test, code="LIMIT = 3\ndef f(x): pass\ndef g(x): pass")).tests
    assert (question.asked, question.statement) == (asked, statement)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("assert f(1) ==", "test_list: test 1: not Python"),
        ("for x in [1]: assert f(x)", "found 'For'; allowed: assert, import, NAME = VALUE"),
        ("assert [f(x) for x in [1]] == [1]", "within a lambda or comprehension"),
        ("x = 1\nassert f(x) == 1", "asks the solution about x, which the test sets"),
        ("assert h(1) == 1", "uses h, which the reference solution does not define"),
        ("assert 1 == 1", "does not use what the reference solution defines (f)"),
    ],
)
def test_tests_that_cannot_be_judged_are_refused(test, message):
    with pytest.raises(DataError, match=r"^task 1: ") as caught:
        take_apart(problem(test))
    assert message in str(caught.value)


# Plain data


class Odd(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            True,
            0,
            -(2**100),
            0.1,
            -0.0,
            float("inf"),
            1e-320,
            1 - 2j,
            "",
            "é\x00\ud800",
            b"\x00\xff",
            bytearray(b"a"),
        ),
        *([], (), set(), frozenset([1]), {}, [1, (2.5, {"a": [None, {1, 2}]})], {(1, "x"): {None: False}}),
    ],
)
def test_plain_data_comes_back_as_it_was(value):
    back = values.decode(values.encode(value))
    assert back == value and type(back) is type(value) and repr(back) == repr(value)


def test_subclasses_come_back_as_the_data_they_hold():
    assert type(values.decode(values.encode(Odd(3)))) is int
    assert values.decode(values.encode([Odd(3)])) == [3]


@pytest.mark.parametrize("value", [object(), len, iter([]), range(3), Odd, sys, [object()], {1: {2: len}}])
def test_nothing_but_plain_data_is_encoded(value):
    with pytest.raises(values.NotPlain):
        values.encode(value)


@pytest.mark.parametrize(
    "text",
    ["", "1", "1.5", "{}", "[]", '["int"]', '["int", 3]', '["int", "0x1", 2]', '["float", null]', '["list", 3]',
     '["eval", "1"]', '["dict", [[1]]]', '["set", [["list", []]]]', '["bytes", "zz"]', '["complex", "0x1p0"]',
     "[" * 100_000],
)  # fmt: skip
def test_nothing_but_encoded_data_is_decoded(text):
    with pytest.raises(ValueError):
        values.decode(text)


# The filter, for both processors: a BPF machine of a few lines runs it


def ruling(machine, number, *arguments, audit=None):
    """What the filter says to a call: "allow", "kill", or the name of the error."""
    words = [number, audit or seccomp.ARCHITECTURES[machine][1], 0, 0]
    for argument in [*arguments, *[0] * (6 - len(arguments))]:
        words += [argument & 0xFFFFFFFF, argument >> 32 & 0xFFFFFFFF]
    program, at, loaded = seccomp.filter_program(machine), 0, 0
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        if code == seccomp.LOAD:
            loaded = words[operand // 4]
        elif code == seccomp.EQUAL:
            at += if_true if loaded == operand else if_false
        elif code == seccomp.ANY_BIT:
            at += if_true if loaded & operand else if_false
        else:
            assert code == seccomp.RETURN
            names = {seccomp.ALLOW: "allow", seccomp.KILL_PROCESS: "kill", seccomp.ERRNO | 1: "EPERM"}
            return names.get(operand, "ENOSYS" if operand == seccomp.ERRNO | 38 else hex(operand))


CALLS = "read openat ioctl fcntl prctl prlimit64 clone clone3 socket kill execve memfd_create ptrace utimensat tgkill"
NUMBERS = {
    "x86_64": (0, 257, 16, 72, 157, 302, 56, 435, 41, 62, 59, 319, 101, 280, 234),
    "aarch64": (63, 56, 29, 25, 167, 261, 220, 435, 198, 129, 221, 279, 117, 88, 131),
}


@pytest.mark.parametrize("machine", NUMBERS)
def test_the_filter_allows_what_it_says_and_nothing_else(machine):
    call = dict(zip(CALLS.split(), NUMBERS[machine], strict=True))
    assert ruling(machine, call["read"]) == "allow"
    assert ruling(machine, call["read"], audit=0x40000003) == "kill"  # 32-bit x86 has other numbers
    assert ruling(machine, 0x40000000 + call["read"]) == "EPERM"
    assert ruling(machine, call["clone3"]) == "ENOSYS"
    for name in (
        "socket",
        "kill",
        "execve",
        "memfd_create",
        "ptrace",
        "utimensat",
        "tgkill",
    ):
        assert ruling(machine, call[name]) == "EPERM", name
    for flags, answer in ((os.O_RDONLY, "allow"), (os.O_CLOEXEC | os.O_DIRECTORY, "allow"), (os.O_WRONLY, "EPERM"),
                          (os.O_RDWR, "EPERM"), (os.O_CREAT, "EPERM"), (os.O_TRUNC, "EPERM")):  # fmt: skip
        assert ruling(machine, call["openat"], 3, 0x7FFF12345678, flags) == answer
    thread, namespace = 0x3D0F00, 0x10000000
    assert ruling(machine, call["clone"], thread) == "allow"
    assert ruling(machine, call["clone"], 17) == "EPERM"  # fork: SIGCHLD
    assert ruling(machine, call["clone"], thread | namespace) == "EPERM"
    assert ruling(machine, call["prlimit64"], 0, 7, 0, 0x7FFF12345678) == "allow"
    assert ruling(machine, call["prlimit64"], 0, 7, 0x7FFF00000000) == "EPERM"
    assert ruling(machine, call["prlimit64"], 0, 7, 0x12345678) == "EPERM"
    assert ruling(machine, call["prlimit64"], 1, 7, 0) == "EPERM"
    assert ruling(machine, call["prctl"], 15) == "allow"
    assert ruling(machine, call["prctl"], 4) == "EPERM"
    assert ruling(machine, call["ioctl"], 1, 0x5401) == "allow"
    assert ruling(machine, call["ioctl"], 1, 0x5412) == "EPERM"  # TIOCSTI types for the terminal's user
    assert ruling(machine, call["fcntl"], 3, 3) == "allow"
    assert ruling(machine, call["fcntl"], 3, 8) == "EPERM"  # F_SETOWN sends signals


# The ladder


def test_the_self_test_sees_every_layer_that_is_missing():
    """Without seccomp metadata lies open, without anything nearly all does; so a rung that lost a layer is refused."""
    if reason := ladder.why_not("kernel"):
        pytest.skip(reason)
    kernel = ladder.RUNGS["kernel"]
    without = {"seccomp": {**kernel.settings, "seccomp": False}, "all": {"landlock_abi": 0, "seccomp": False}}
    found = {}
    for name, settings in without.items():
        zygote = replace(kernel, settings=settings).start(Limits())
        try:
            found[name] = ladder._probe(zygote) or ""
        finally:
            zygote.close()
    assert "got out" in found["seccomp"] and "changes a mode" in found["seccomp"]
    assert "reads a file outside" not in found["seccomp"]
    for through in ("connects by tcp", "reads a file outside", "forks", "executes", "signals the caller", "deletes"):
        assert through in found["all"]


def test_no_rung_means_no_run(monkeypatch):
    monkeypatch.setattr(ladder, "why_not", lambda name: f"no {name} here")
    with pytest.raises(SandboxError, match=r"no sandbox .* 'strict' is not available: no strict here; 'kernel' is not"):
        open_sandbox()
    with pytest.raises(SandboxError, match="--sandbox kernel: no kernel here"):
        open_sandbox("kernel")


def test_a_step_down_is_announced(monkeypatch):
    monkeypatch.setattr(ladder, "why_not", lambda name: "no bwrap" if name == "strict" else None)
    with pytest.warns(SandboxWarning, match="'kernel' is used; 'strict' is not available: no bwrap"):
        open_sandbox().close()


def test_a_missing_bubblewrap_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(ladder, "bubblewrap", lambda: None)
    with pytest.raises(SandboxError, match=r"bubblewrap is not installed \(apt install bubblewrap, or pip install"):
        ladder.RUNGS["strict"].start(Limits())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "--i-know-this-runs-untrusted-code"),
        ("strickt", "did you mean 'strict'?"),
        ("docker", "allowed: kernel, none"),
    ],
)
def test_rungs_are_asked_for_by_name(name, message):
    with pytest.raises(SandboxError) as caught:
        open_sandbox(name)
    assert message in str(caught.value)


def test_without_a_sandbox_results_say_so_and_limits_hold(tmp_path):
    with open_sandbox("none", TIGHT, accept_unsandboxed=True) as opened:
        assert opened.judge("def f(): return 1", problem("assert f() == 1")).rung == "unsandboxed"
        assert opened.judge("while True: pass", problem("assert f() == 1")).result == "timed out"
        assert opened.judge("x = bytearray(2**30)", problem("assert f() == 1")).result == "out of memory"
        environment = "import os\ndef f(): return dict(os.environ)"
        assert opened.judge(environment, problem("assert f() == {}")).passed
        left = f"import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    open('{tmp_path}/made', 'w')\n"
        assert opened.judge(left + "def f(): return 1", problem("assert f() == 1")).passed
        time.sleep(1.5)
        assert not (tmp_path / "made").exists()


# Ending


def test_closing_ends_what_is_under_way(rung):
    opened = open_sandbox(rung)
    caught = []

    def judge():
        try:
            opened.judge("import time; time.sleep(600)", problem("assert f() == 1"))
        except SandboxError as error:
            caught.append(str(error))

    thread = threading.Thread(target=judge)
    thread.start()
    time.sleep(0.5)
    begin = time.monotonic()
    opened.close()
    thread.join(10)
    assert caught == ["the sandbox is closed"]
    assert time.monotonic() - begin < 5
    with pytest.raises(SandboxError, match="closed"):
        opened.judge("", problem("assert f() == 1"))


def test_stopping_early_ends_the_rest(rung):
    opened = open_sandbox(rung)
    items = [("def f(): return 1", problem("assert f() == 1"))] + [
        ("import time; time.sleep(600)", problem("assert f()"))
    ] * 3
    begin = time.monotonic()
    verdicts = opened.verdicts(items, 2)
    assert next(verdicts).passed
    verdicts.close()
    assert time.monotonic() - begin < 10


def test_everything_ends_with_the_caller(rung, tmp_path):
    """A caller that is killed leaves no process behind, not even one with a candidate at work."""
    code = f"""
from archbench.sandbox import open_sandbox
from archbench.data.problems import Problem
sandbox = open_sandbox({rung!r})
print("ready", flush=True)
asked = Problem(task_id=1, text="", code="def f(): pass", test_list=("assert f()",))
sandbox.judge("import time; time.sleep(600)", asked)
"""
    marker = f"archbench-{secrets.token_hex(6)}"
    caller = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": f"/{marker}", "TMPDIR": str(tmp_path)},
    )
    assert caller.stdout.readline() == "ready\n"
    time.sleep(1.0)

    def alive():
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if marker.encode() in path.read_bytes():
                    found.append(path.parent.name)
            except OSError:
                continue
        return found

    assert len(alive()) >= 3  # the caller, the zygote, its child
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    caller.stdout.close()
    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()


def test_a_sandbox_that_dies_is_replaced(rung):
    with open_sandbox(rung) as opened:
        assert opened.judge("def f(): return 1", problem("assert f() == 1")).passed
        (zygote,) = opened._idle
        os.killpg(zygote.process.pid, signal.SIGKILL)
        zygote.process.wait()
        assert opened.judge("def f(): return 1", problem("assert f() == 1")).passed


# MBPP itself


@pytest.fixture(scope="module")
def mbpp(archbench_data):
    return read_problems(archbench_data / "mbpp" / "mbpp.jsonl")


@pytest.mark.slow
def test_every_reference_solution_passes(sandbox: Sandbox, mbpp):
    verdicts = sandbox.judge_all([(problem.code, problem) for problem in mbpp], workers=2)
    assert {p.task_id: v.result for p, v in zip(mbpp, verdicts, strict=True) if not v.passed} == {}
    assert len(verdicts) == 974


def test_every_challenge_test_is_passed(sandbox, mbpp):
    hard = [problem for problem in mbpp if problem.challenge_test_list]
    assert len(hard) == 11
    assert all(sandbox.judge(problem.code, problem, challenge=True).passed for problem in hard)


def test_another_problems_solution_fails(sandbox, mbpp):
    """Each problem with the next one's solution, under its own function's name: nearly all must fail."""
    items = []
    for here, other in itertools.pairwise(mbpp[:121]):
        (name,) = {question.asked[0].partition("(")[0] for question in take_apart(here).tests[:1]}
        theirs = take_apart(other).tests[0].asked[0].partition("(")[0]
        items.append((f"{other.code}\n{name} = {theirs}\n", here))
    assert sum(verdict.passed for verdict in sandbox.judge_all(items, workers=2)) <= 2


def test_all_tests_come_apart(mbpp):
    taken = [take_apart(problem, challenge=True) for problem in mbpp]
    questions = [question for each in taken for question in each.tests]
    assert len(questions) == 3 * 974 + 16
    assert all(len(question.asked) == 1 for question in questions)
    odd = {question.statement for question in questions if not question.statement.startswith("assert _answer_0 == ")}
    assert odd == {f"assert int(_answer_0) == {n}" for n in (35, 5, 20)}
