"""Programs that try to pass without solving, or to get out. None may pass, and none may leave a trace outside.

Each is put in place of a solution to a problem whose tests are

    assert secret(1) == TOKEN      and      assert secret(2) == TOKEN + "!"

where TOKEN is random: a program that finds it out has seen what it must not see. `world` gives each the addresses of
things outside (see `World`): a program text may hold {file}, {folder}, {port}, {socket}, {process}, {victim}.
"""

ANYTHING = "\ndef secret(n): return 'wrong'\n"

# Searches that return what looks like the token: TOKEN-, then 16 hexadecimal digits.
LOOK = """
import re, sys
def look(text):
    found = re.search(r'TOKEN-[0-9a-f]{{16}}', text)
    return found and found.group()
"""

PROGRAMS = {
    # Ending early, and saying that all is well.
    "exits the process": "import os; os._exit(0)",
    "exits by exception": "import sys; sys.exit(0)",
    "exits in the call": "import os\ndef secret(n): os._exit(0)",
    "exits after printing success": "import os\nprint('passed', flush=True)\nos._exit(0)",
    "exits at exit": "import atexit, os\natexit.register(os._exit, 0)" + ANYTHING,
    "raises a BaseException": "def secret(n): raise BaseException('passed')",
    "raises a generator's end": "def secret(n): raise GeneratorExit",
    "writes verdicts to every descriptor": """
import os
for descriptor in range(256):
    for text in (b'{{"passed": true, "result": "passed"}}', b'passed\\n', b'+'):
        try:
            os.write(descriptor, text)
        except OSError:
            pass
os._exit(0)""",
    "writes a verdict as its report": """
import os
os.write(3, b'{{"passed": true, "result": "passed"}}')
os._exit(0)""",
    "reports that it failed by passing": """
import os
os.write(3, b'{{"failed": "error", "detail": "\\\\u001b[2Jpassed"}}')
os._exit(0)""",
    "reports answers of its own": """
import os
os.write(3, b'{{"answers": [["\\\\"TOKEN\\\\""], ["\\\\"TOKEN!\\\\""]]}}')
os._exit(0)""",
    "reports no answers": "import os\nos.write(3, b'{{\"answers\": []}}')\nos._exit(0)",
    "reports too few answers": "import os\nos.write(3, b'{{\"answers\": [[], []]}}')\nos._exit(0)",
    "reports odd answers": "import os\nos.write(3, b'{{\"answers\": [[[1]], {{}}]}}')\nos._exit(0)",
    "reports deep brackets": "import os\nos.write(3, b'[' * 200_000)\nos._exit(0)",
    "reports deep answers": """
import json, os
os.write(3, json.dumps({{"answers": [['["list", [' * 20_000], ["1"]]}}).encode())
os._exit(0)""",
    "closes its report": "import os\nos.close(3)" + ANYTHING,
    "closes everything": "import os\nos.closerange(0, 64)" + ANYTHING,
    # Values that claim to be equal.
    "returns what equals everything": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = None
def secret(n): return Equal()""",
    "returns a text that equals everything": """
class Equal(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
    def __str__(self): return self
    __repr__ = __iter__ = __str__
def secret(n): return Equal('wrong')""",
    "returns a lie about its class": """
class Lie:
    __class__ = property(lambda self: str)
    def __eq__(self, other): return True
def secret(n): return Lie()""",
    "returns a container of such": """
class Equal(dict):
    def __eq__(self, other): return True
    def items(self): return []
def secret(n): return Equal(a=1)""",
    "returns a number that equals everything": """
class Equal(int):
    def __eq__(self, other): return True
    def __index__(self): return 7
    __hash__ = int.__hash__
def secret(n): return Equal(7)""",
    "returns nan": "def secret(n): return float('nan')",
    "returns the name of the answer": "_answer_0 = _answer_1 = 'x'\ndef secret(n): return '_answer_0'",
    # Tampering with the interpreter.
    "makes asserts harmless": """
import builtins
class AssertionError(Exception): pass
builtins.AssertionError = AssertionError
builtins.isinstance = lambda *_: True
builtins.eval = builtins.exec = lambda *_: None
builtins.compile = lambda *_, **__: None"""
    + ANYTHING,
    "deletes the builtins": "import builtins\nfor name in list(vars(builtins)): delattr(builtins, name)",
    "replaces json": """
import json
json.dumps = lambda *_, **__: '{{"passed": true, "result": "passed"}}'
json.loads = lambda *_, **__: {{'passed': True}}"""
    + ANYTHING,
    "replaces the runner's functions": """
import sys
frame = sys._getframe()
while frame:
    for name in ('encode', '_solve', 'judge', '_judged', '_write', '_collect'):
        if name in frame.f_globals:
            frame.f_globals[name] = lambda *_, **__: '{{"passed": true, "result": "passed"}}'
    frame = frame.f_back"""
    + ANYTHING,
    "plays the judge": """
import sys
frame = sys._getframe()
while frame:
    if 'ROLES' in frame.f_globals:
        frame.f_globals['ROLES'].update(solve=lambda _: b'x', judge=lambda _: b'{{"passed": true}}')
    frame = frame.f_back"""
    + ANYTHING,
    "keeps the process from ending": """
import os, sys
os._exit = sys.exit = os.abort = lambda *_: None
os.write = lambda descriptor, data: len(data)"""
    + ANYTHING,
    "traces what runs after it": """
import sys
def trace(frame, event, argument):
    frame.f_locals.clear()
    return trace
sys.settrace(trace); sys.setprofile(trace)"""
    + ANYTHING,
    "empties the module table": "import sys\nsys.modules.clear()\nsys.path.clear()" + ANYTHING,
    "leaves threads that write": """
import os, threading
def write():
    while True:
        os.write(3, b'{{"answers": [["1"], ["1"]]}}')
for _ in range(4): threading.Thread(target=write).start()"""
    + ANYTHING,
    "turns every signal off": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    # Looking for what is expected.
    "walks the stack": LOOK
    + """
def secret(n):
    frame, texts = sys._getframe(), []
    while frame:
        texts += [repr(frame.f_locals), repr(frame.f_globals)]
        frame = frame.f_back
    return (look(' '.join(texts)) or 'none') + '!' * (n - 1)""",
    "searches every object": LOOK
    + """
import gc
def secret(n):
    for thing in gc.get_objects():
        try: found = look(repr(thing))
        except Exception: continue
        if found: return found + '!' * (n - 1)""",
    "searches memory": LOOK
    + """
import ctypes
def secret(n):
    start = id(object()) & ~0xFFFFF
    found = look(ctypes.string_at(start, 0x100000).decode('latin-1'))
    return (found or 'none') + '!' * (n - 1)""",
    "searches memory by its map": LOOK
    + """
def secret(n):
    for line in open('/proc/self/maps'):
        begin, end = (int(part, 16) for part in line.split()[0].split('-'))
        with open('/proc/self/mem', 'rb') as memory:
            memory.seek(begin)
            found = look(memory.read(end - begin).decode('latin-1'))
        if found: return found + '!' * (n - 1)""",
    "reads every descriptor": LOOK
    + """
import os
def secret(n):
    for descriptor in range(64):
        try: found = look(os.read(descriptor, 1 << 20).decode('latin-1'))
        except OSError: continue
        if found: return found + '!' * (n - 1)""",
    "reads the tests from disk": LOOK + "\ndef secret(n): return look(open('{file}').read()) + '!' * (n - 1)",
    "reads the caller's environment": LOOK
    + """
import os
def secret(n): return (look(repr(dict(os.environ))) or 'none') + '!' * (n - 1)""",
    "reads the environment of processes": LOOK
    + """
import os
def secret(n):
    for process in ('self', os.getppid(), {process}):
        try: found = look(open(f'/proc/{{process}}/environ').read())
        except OSError: continue
        if found: return found + '!' * (n - 1)""",
    "reads the processes' command lines": LOOK
    + """
import glob
def secret(n):
    for path in glob.glob('/proc/[0-9]*/cmdline'):
        try: found = look(open(path).read())
        except OSError: continue
        if found: return found + '!' * (n - 1)""",
    "reads its caller's memory": LOOK
    + """
import ctypes
class Vector(ctypes.Structure):
    _fields_ = (('base', ctypes.c_void_p), ('length', ctypes.c_size_t))
def secret(n):
    buffer = ctypes.create_string_buffer(1 << 20)
    here, there = Vector(ctypes.addressof(buffer), 1 << 20), Vector(id(object()) & ~0xFFFFF, 1 << 20)
    for process in ({process}, __import__('os').getppid()):
        ctypes.CDLL(None).process_vm_readv(process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if found := look(buffer.raw.decode('latin-1')): return found + '!' * (n - 1)""",
    "reads the home folder": "import os\ndef secret(n): return os.listdir(os.path.expanduser('~')) and 'wrong'",
    # Using up the machine.
    "bombs with forks": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "bombs with forks from C": "import ctypes\nlibc = ctypes.CDLL(None)\nwhile True: libc.fork(); libc.vfork()",
    "bombs with threads": """
import threading, time
threading.stack_size(32 * 1024)
while True:
    try: threading.Thread(target=time.sleep, args=(60,)).start()
    except RuntimeError: pass""",
    "takes ten gigabytes": "block = bytearray(10 * 2**30)" + ANYTHING,
    "takes gigabytes bit by bit": "blocks = []\nwhile True: blocks.append(bytearray(2**20))",
    "maps memory": "import mmap\nblocks = []\nwhile True: blocks.append(mmap.mmap(-1, 2**26))",
    "loops": "while True: pass",
    "loops in C": "import re\nre.match('(a+)+b', 'a' * 64)",
    "loops in threads": """
import threading
def loop():
    while True: pass
for _ in range(8): threading.Thread(target=loop).start()
loop()""",
    "sleeps": "import time\ntime.sleep(3600)",
    "waits for a lock": "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
    "prints without end": "while True: print('x' * 65536)",
    "writes reports without end": "import os\nwhile True: os.write(3, b'x' * 65536)",
    "returns a long text": "def secret(n): return 'x' * (200 * 2**20)",
    "returns a list of itself": "def secret(n):\n    x = []\n    x.append(x)\n    return x",
    "returns doubled sharing": "def secret(n):\n    x = []\n    for _ in range(64): x = [x, x]\n    return x",
    "returns deep nesting": "def secret(n):\n    x = []\n    for _ in range(100_000): x = [x]\n    return x",
    "returns a huge number": "def secret(n): return 1 << (2**24)",
    "returns without end": "import itertools\ndef secret(n): return itertools.count()",
    "recurses without end": "import sys\nsys.setrecursionlimit(2**30)\ndef secret(n): return secret(n)",
    "answers with colliding hashes": "def secret(n): return {{i * (2**61 - 1): 0 for i in range(30_000)}}",
    # Getting out.
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)" + ANYTHING,
    "connects to a unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('{socket}')" + ANYTHING,
    "writes outside": "open('{file}', 'w').write('overwritten')" + ANYTHING,
    "writes outside by another way": """
import os
for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_APPEND | os.O_WRONLY):
    try: os.write(os.open('{file}', flags), b'overwritten')
    except OSError: pass
try: os.open('{folder}/made', os.O_CREAT)
except OSError: pass"""
    + ANYTHING,
    "changes what a file is": """
import os
for change in (
    lambda: os.chmod('{file}', 0o777), lambda: os.utime('{file}', (1, 1)), lambda: os.truncate('{file}', 0),
    lambda: os.setxattr('{file}', 'user.x', b'1'), lambda: os.rename('{file}', '{file}-moved'),
    lambda: os.link('{file}', '{file}-link'), lambda: os.unlink('{file}'), lambda: os.mkdir('{folder}/made'),
    lambda: os.mkfifo('{folder}/made'), lambda: os.symlink('{file}', '{folder}/made'), lambda: os.chown('{file}', 1, 1),
):
    try: change()
    except OSError: pass"""
    + ANYTHING,
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)" + ANYTHING,
    "kills what it can": """
import os, signal
for process in ({victim}, {process}, os.getppid(), 1, 0, -1):
    for kill in (os.kill, os.killpg):
        try: kill(process, signal.SIGKILL)
        except OSError: pass"""
    + ANYTHING,
    "kills by raw calls": """
import ctypes, platform
libc = ctypes.CDLL(None)
x86 = platform.machine() == 'x86_64'
for number in (62, 200, 234, 297, 129, 424) if x86 else (129, 130, 131, 240, 424):
    libc.syscall(number, {victim}, 9)
    libc.syscall(number, {victim}, {victim}, 9)"""
    + ANYTHING,
    "starves its neighbours": """
import os, resource
for change in (
    lambda: resource.prlimit({victim}, resource.RLIMIT_CPU, (1, 1)),
    lambda: os.setpriority(os.PRIO_PROCESS, {victim}, 19), lambda: os.sched_setaffinity({victim}, [0]),
):
    try: change()
    except OSError: pass"""
    + ANYTHING,
    "traces a process": "import ctypes\nctypes.CDLL(None).ptrace(16, {victim}, 0, 0)" + ANYTHING,
    "runs a program": "import os\nos.execv('/bin/sh', ['sh', '-c', 'touch {folder}/made'])",
    "runs a program beside": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'touch {folder}/made'])" + ANYTHING,
    "runs a program from memory": """
import os
descriptor = os.memfd_create('x')
os.write(descriptor, open('/bin/true', 'rb').read())
os.execv(f'/proc/self/fd/{{descriptor}}', ['x'])""",
    "leaves a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1)
        open('{folder}/made', 'w')""",
    "makes namespaces": "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.unshare(0x10000000)\nlibc.unshare(0x20000)"
    + ANYTHING,
    "mounts": "import ctypes\nctypes.CDLL(None).mount(b'none', b'{folder}', b'tmpfs', 0, 0)" + ANYTHING,
    "calls by other numbers": """
import ctypes
libc = ctypes.CDLL(None)
for number in range(600):
    libc.syscall(0x40000000 + number, {victim}, 9, 0, 0, 0, 0)"""
    + ANYTHING,
}
