"""A corpus of hostile answers: nothing happens outside, each costs its own score, the rest are scored as ever."""

import contextlib
import fcntl
import functools
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from data.confined import Limits, Pool, seccomp
from data.confined.worker import read_message, write_message
from data.tasks import Problem, TaskSpec, generate, score
from data.verifiers import Verifiers, score_math, score_task
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    not seccomp.available(), reason="only Linux on x86_64 and aarch64 has the fence"
)

REACHES = """__import__("os").system("touch {mark}")
[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == "Popen"][0](["touch", "{mark}"])
open("{mark}", "w").write("x")
exec("open(\\"{mark}\\", \\"w\\")")
eval(compile("__import__(\\"pathlib\\").Path(\\"{mark}\\").touch()", "a", "eval"))
getattr(__import__("os"), "sys" + "tem")("touch {mark}")
(lambda: __import__("subprocess").run(["touch", "{mark}"]))()
[[__import__("os").system("touch {mark}")], 1]
__import__("socket").create_connection(("127.0.0.1", {port}))
__import__("os").kill(__import__("os").getppid(), 9)
__import__("os")._exit(0)
exit()
1 + 1 if print("x" * 10**6) else 2"""
HANGS = (
    """9**9**9**9
"a" * 10**12
factorial(10**9)
(lambda f: f(f))(lambda f: f(f))
[0] * 10**11"""
    "\n" + "(" * 5000 + ")" * 5000
)


@pytest.fixture
def listener():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        yield server


EVALUATING = ["countdown", "puzzle24", "string_insertion", "spiral_matrix", "binary_matrix", "n_queens",
              "polynomial_multiplication", "simple_integration", "number_sorting", "bitwise_arithmetic"]  # fmt: skip


def test_hostile_answers_do_nothing_and_score_next_to_nothing(tmp_path, listener):
    mark = tmp_path / "mark"
    texts = REACHES.format(mark=mark, port=listener.getsockname()[1]).splitlines()
    problems = [generate([TaskSpec(task)], "train", 1, 0)[0] for task in EVALUATING]
    with Verifiers(workers=2, timeout=20.0) as verifiers:
        for problem in problems:
            verdicts = verifiers.score([problem] * len(texts), texts)
            assert max(verdict.value for verdict in verdicts) < 0.2, (problem.task, verdicts)
        right = verifiers.score(problems, [problem.answer for problem in problems])
    assert [verdict.value for verdict in right] == [1.0] * len(problems)
    assert not mark.exists()
    with pytest.raises(TimeoutError):
        listener.accept()


FORGED = """lambdify((), "[fd for fd in range(3, 64) if __import__('os').write(fd, b'{{}}')]", "math")()
lambdify((), "__import__('os').write(4, b'{value}') and __import__('os')._exit(0)", "math")()"""


@pytest.mark.parametrize(
    "value", ['{"value": 1.0}', '{"value": 1' + "0" * 400 + "}", '{"value": ' + "[" * 2000]
)
def test_an_answer_writes_no_verdict_of_its_own(value):
    problem = generate([TaskSpec("countdown")], "train", 1, 0)[0]
    texts = FORGED.format(value=value).splitlines()
    with Verifiers(timeout=10.0) as verifiers:
        verdicts = verifiers.score([problem] * 3, [*texts, problem.answer])
    assert [verdict.value >= 0.5 for verdict in verdicts] == [False, False, True]


def test_answers_that_hang_or_fill_memory_cost_themselves_alone():
    problem = generate([TaskSpec("countdown")], "train", 1, 0)[0]
    texts = [*HANGS.splitlines(), problem.answer]
    began = time.monotonic()
    with Verifiers(workers=2, timeout=3.0) as verifiers:
        verdicts = verifiers.score([problem] * len(texts), texts)
    assert [verdict.value >= 1 for verdict in verdicts] == [False] * (len(texts) - 1) + [True]
    assert verdicts[0].timed_out and time.monotonic() - began < 120


def test_the_public_scorer_is_confined_too(tmp_path):
    problem = generate([TaskSpec("countdown")], "train", 1, 0)[0]
    mark = tmp_path / "mark"
    assert score(problem, f"__import__('os').system('touch {mark}')") < 1
    assert score(problem, problem.answer) == 1 and not mark.exists()


def probe(what, argument=None):
    if what == "environment":
        return dict(os.environ)
    if what == "folder":
        return os.listdir(".")
    if what == "read":
        return open(argument).read()
    if what == "write":
        return open("f", "w").write("x")
    if what == "flood":
        return "x" * argument
    if what == "fork":
        return os.fork()
    if what == "connect":
        return socket.create_connection(("127.0.0.1", argument)) and True
    if what == "unix":
        return socket.socket(socket.AF_UNIX) and True
    if what == "kill":
        return os.kill(argument, signal.SIGKILL)
    if what == "exec":
        return os.execv(sys.executable, [sys.executable, "-c", ""])
    if what == "signal":  # by a file that says so when it can be read
        ours, theirs = os.pipe()
        fcntl.fcntl(ours, fcntl.F_SETSIG, signal.SIGKILL)
        return fcntl.fcntl(ours, fcntl.F_SETOWN, argument)
    if what == "pipe":  # as evaluated text may, without going through the function's own reply
        for descriptor in range(3, 64):
            with contextlib.suppress(OSError):
                os.write(descriptor, argument.encode())
        os._exit(0)
    if what == "huge":
        return 10**400
    if what == "deep":
        return functools.reduce(lambda inner, _: [inner], range(990), [])
    if what == "spin":
        while True:
            pass
    if what == "spoil":
        Problem.answer = "spoilt"
        return getattr(probe, "spoilt", None) or setattr(probe, "spoilt", True)
    return os.getppid() if what == "worker" else os.getpid()


def test_a_confined_process_has_no_surroundings(tmp_path, monkeypatch, listener):
    monkeypatch.setenv("SECRET", "x")
    (tmp_path / "key").write_text("private")
    port = listener.getsockname()[1]
    calls = [("environment",), ("folder",), ("read", str(tmp_path / "key")), ("write",), ("flood", 1 << 20), ("fork",),
             ("connect", port), ("unix",), ("kill", os.getpid()), ("exec",), ("spoil",), ("spoil",)]  # fmt: skip
    with Pool(probe, limits=Limits(seconds=5)) as pool:
        outcomes = dict(zip(range(len(calls)), pool.map(calls), strict=True))
    assert "SECRET" not in outcomes[0].value and outcomes[1].value == []
    assert [outcomes[i].error.split(":")[0] for i in (2, 3)] == ["PermissionError"] * 2
    assert outcomes[4].error == "flood"
    assert [outcomes[i].error.split(":")[0] for i in range(5, 10)] == ["PermissionError"] * 5
    assert outcomes[11].value is None and not outcomes[11].error  # nothing is left of the call before


@pytest.mark.parametrize("reply", ['{"value": 1.0}', "[" * 3000, "x" * 100, ""])
def test_what_a_call_writes_beside_its_reply_is_no_reply(reply):
    with Pool(probe, limits=Limits(seconds=5)) as pool:
        assert pool.map([("pipe", reply)])[0].error == "died"
        huge, deep, signals = pool.map([("huge",), ("deep",), ("signal", os.getpid())])
    assert huge.value == 10**400 and (deep.value or deep.error)
    assert signals.error.startswith("PermissionError")


def test_nothing_of_the_callers_own_folder_can_be_read(tmp_path):
    (tmp_path / "token.txt").write_text("private")
    script = f"""
import sys; sys.path[:0] = ["", {str(ROOT)!r}]
from data.confined import Pool
from tests.data.test_confined import probe
with Pool(probe) as pool:
    print(pool.map([("read", {str(tmp_path / "token.txt")!r}), ("read", {str(ROOT / ".git" / "HEAD")!r})]))
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.count("PermissionError") == 2, run.stdout + run.stderr


def test_a_call_ends_with_the_process_that_asked(tmp_path):
    script = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}]
from data.confined import Limits, Pool
from tests.data.test_confined import probe
pool = Pool(probe, limits=Limits(seconds=100))
print(pool.map([("worker",)])[0].value, flush=True)
pool.map([("spin",)])
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(process.stdout.readline()))
    deadline = time.monotonic() + 60
    while not (children := worker.children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs([worker, *children], timeout=30)
    assert not alive


def test_a_worker_that_dies_idle_is_replaced():
    with Pool(probe, limits=Limits(seconds=5)) as pool:
        (first,) = pool.map([("worker",)])
        os.kill(first.value, signal.SIGKILL)
        time.sleep(0.2)
        (second,) = pool.map([("worker",)])
    assert second.value not in (None, first.value)


def is_the_answer(problem, answer):
    return 1.0 if answer == problem.answer else 0.0


def test_equal_answers_to_a_problem_are_asked_once(monkeypatch):
    one, other = Problem("a", "t", "q", "1"), Problem("b", "t", "q", "2")
    with Verifiers(is_the_answer) as verifiers:
        calls, ask = [], verifiers._pool.map
        monkeypatch.setattr(
            verifiers._pool, "map", lambda arguments: calls.extend(arguments) or ask(arguments)
        )
        verdicts = verifiers.score([one, one, other, other, one], ["1", "1", "1", None, "2"])
    assert [verdict.value for verdict in verdicts] == [1, 1, 0, 0, 0]
    assert calls == [(one, "1"), (other, "1"), (one, "2")]


def test_nothing_of_a_pool_is_left_behind():
    with Pool(probe, limits=Limits(seconds=5)) as pool:
        (worker,) = pool.map([("worker",)])
        folder = pool._workers[0]._folder.name
    with pytest.raises(ProcessLookupError):
        os.kill(worker.value, 0)
    assert not os.path.exists(folder)


def test_a_function_that_another_process_cannot_find_is_refused_at_once():
    with pytest.raises(ValueError, match="lambda"):
        Pool(lambda: None)


def test_replies_are_read_to_a_bound():
    ours, theirs = os.pipe()
    write_message(theirs, b"x" * 100)
    with pytest.raises(ValueError, match="100 bytes"):
        read_message(ours, 99)


def test_mathematics_is_compared_where_bombs_are_killed():
    problems = [Problem("p", "t", "q", gold) for gold in ("1/2", "7")]
    with Verifiers(score_math, timeout=8.0) as verifiers:
        values = [v.value for v in verifiers.score(problems, ["0.5", "2003^{2002^{2001}}"])]
    assert values == [1, 0]


@pytest.mark.slow  # every task of reasoning-gym
def test_right_answers_are_right_in_the_confined_process_as_outside():
    import reasoning_gym

    from data.tasks import score_trusted

    problems = []
    for task in sorted(reasoning_gym.factory.DATASETS):
        try:
            problems += generate([TaskSpec(task)], "train", 2, 0, unique=False)
        except ValueError:
            continue  # a task with settings of its own
    with Verifiers(score_task, workers=2, timeout=60.0) as verifiers:
        confined = verifiers.score(problems, [problem.answer for problem in problems])
    outside = [score_trusted(problem, problem.answer) for problem in problems]
    assert [(p.task, v.value) for p, v in zip(problems, confined)] == [
        (p.task, v) for p, v in zip(problems, outside)
    ]
