"""`attnbook sweep` on a real Ray: one of its own with two workers, and a cluster on the loopback address."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types

import pytest
from test_commands import ROOT, attnbook, refused

import attnbook.lab.sweep as sweeping
from attnbook.lab.parameters import example_notebook
from attnbook.lab.sweep import sweep_chapter

psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs Ray")

# What the small notebook does besides: it waits until two runs have begun, breaks for n = 2, kills its worker for n = 3 (both until the file `repaired` is
# there), and records where it ran.
EXTRA = (
    """
import time
meet = pathlib.Path(os.environ["SWEEP_TEST"])
(meet / f"begun-{n}").touch()
end = time.monotonic() + 60
while len(list(meet.glob("begun-*"))) < 2: assert time.monotonic() < end, "alone"; time.sleep(0.05)
broken = not (meet / "repaired").exists()
if broken and n == 3: os.kill(os.getppid(), 9)
""",
    "if broken and n == 2: raise RuntimeError('two is too many')",
    """
import attnbook
with open(rows / "where.jsonl", "a") as f: f.write(json.dumps({"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "library": attnbook.__file__}) + "\\n")
""",
)

# Ray gives a client 30 seconds, which a machine with other tests to run may need.
PATIENT = {
    "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120",
    "RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "60",
    "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "60",
}


@pytest.fixture
def notebook(tmp_path):
    return example_notebook(tmp_path / "01_small.ipynb", *EXTRA)


def listening(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def head_of_cluster(folder, environment):
    """Starts a Ray of one machine and waits until it answers: its process and port; None for the port if it ended, as Ray does where it is slow to start."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = [
        sys.executable,
        "-c",
        "from ray.scripts.scripts import main; main()",
        "start",
        "--head",
        "--block",
        "--port=0",
        f"--ray-client-server-port={port}",
        "--num-cpus=2",
        "--num-gpus=1",
        "--include-dashboard=false",
        "--object-store-memory=100000000",
        f"--temp-dir={folder}",
    ]
    with open(os.path.join(folder, "said"), "w") as said:
        head = subprocess.Popen(
            start,
            stdout=said,
            stderr=said,
            start_new_session=True,
            env={**os.environ, "RAY_raylet_start_wait_time_s": "120", **environment},  # 10 s are few beside other work
        )
    end = time.monotonic() + 150
    while not listening(port):
        if head.poll() is not None or time.monotonic() > end:
            return head, None
        time.sleep(0.2)
    return head, port


@contextlib.contextmanager
def cluster(**environment):
    """The address of a Ray of one machine, on the loopback interface, with two cores and, so it believes, a GPU."""
    for last in (False, False, True):
        with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
            head, port = head_of_cluster(folder, environment)
            family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
            try:
                if port:
                    yield f"ray://127.0.0.1:{port}"
                    return
                with open(os.path.join(folder, "said")) as said:
                    assert not last, f"the cluster does not start: {said.read()[-2000:]}"
            finally:
                head.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    head.wait(30)
                for p in [*alive(family), head]:
                    p.kill()


def alive(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    "grid, how, error, words",
    [
        (
            {"m": ["1"]},
            {},
            ValueError,
            r"small has no parameter 'm'; it has preset \('smoke' \| 'cpu' \| 'gpu'\), n \(int, >= 0\), scale \(float\)",
        ),
        ({"n": ["1", "many"]}, {}, TypeError, r"parameter n \(int, >= 0\) of small cannot be 'many'"),
        ({"preset": ["cpu", "tpu"]}, {}, ValueError, "'tpu'"),
        ({"n": ["1", "01"]}, {}, ValueError, "parameter 'n' is given a value twice"),
        ({}, {}, ValueError, r"a sweep needs values to run over; small has preset .*, n \(int, >= 0\), scale"),
        ({"n": ["1"]}, {"workers": 0}, ValueError, "workers cannot be 0"),
        (
            {"n": ["1"]},
            {"workers": 2, "address": "ray://here:1"},
            ValueError,
            "workers cannot be 2: on a cluster Ray decides",
        ),
    ],
)
def test_bad_sweeps_do_not_start(notebook, grid, how, error, words):
    out = notebook.parent / "sweep"
    with pytest.raises(error, match=words):
        sweep_chapter(notebook, grid, out=out, text=True, progress=False, **how)
    assert not out.exists()


def test_folders_of_others_are_refused(notebook, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "sweep.json").write_text('{"chapter": "small", "code": "00000000"}\n')
    for out, error, words in (
        (tmp_path, ValueError, "holds other things; choose another"),
        (other, ValueError, "holds another sweep, or this one before the chapter changed"),
        (notebook / "below", OSError, "cannot write to the output folder"),
    ):
        with pytest.raises(error, match=words):
            sweep_chapter(notebook, {"n": [1]}, out=out, progress=False)


def test_without_ray(notebook, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['ray'] = None\n")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "attnbook", "sweep", str(notebook), "-g", "n=1", "--out", str(tmp_path / "sweep")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 2 and "pip install 'attnbook[ray]'" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_no_cluster(notebook, tmp_path):
    """Nothing listens on port 1."""
    impatient = {name: "1" for name in PATIENT}
    assert "no Ray answers at ray://127.0.0.1:1: " in refused(
        "sweep", notebook, "-g", "n=1", "--out", tmp_path / "sweep", "--address", "ray://127.0.0.1:1", **impatient
    )


def sweep_of_three(notebook, tmp_path):
    """Two workers here, a cell that fails and a worker that dies: the folder, a function that sweeps again, its environment."""
    env = {
        "SWEEP_TEST": str(tmp_path),
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        **PATIENT,
    }
    out = tmp_path / "sweep"
    start = lambda *words: attnbook("sweep", notebook, "--out", out, *words, cwd=tmp_path, **env)
    first = start("-g", "n=1,2,3", "-g", "preset=gpu", "--workers", "2", "--no-progress")
    assert first.returncode == 1 and "Traceback" not in first.stderr, first.stderr
    rows = [line for line in first.stdout.splitlines() if line.startswith("| ")]
    assert rows[0] == "| run | preset | n | sum | seconds | rows | claims | folder | outcome |" and len(rows) == 5
    assert rows[2].startswith("| 1 | gpu | 1 | 0 |") and rows[2].endswith("| 2 |  | n=1,preset=gpu | finished |")
    assert "failed: cell 10 (`if broken and n == 2: raise" in rows[3] and "RuntimeError: two is too many" in rows[3]
    assert "| failed: " in rows[4] and "worker" in rows[4]
    assert {p.name for p in out.iterdir()} == {"n=1,preset=gpu", "n=2,preset=gpu", "sweep.json", "rows.jsonl"}
    assert json.loads((out / "n=1,preset=gpu" / "results" / "where.jsonl").read_text())["gpu"] == ""
    return out, start, env


def test_a_sweep_here(notebook, tmp_path):
    sweep_of_three(notebook, tmp_path)


class Broken(Exception):
    "What a task raises whose worker died."


class Started:
    "A task that was handed to Ray."

    def __init__(self, task, given):
        self.task, self.given = task, given


class RayInline:
    "What a sweep uses of Ray, with the tasks one after another in this process. Those in `dying` break once."

    exceptions = types.SimpleNamespace(RayError=Broken)

    def __init__(self):
        self.dying, self.ran = {3}, []

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 1}}]

    def remote(self, task):
        keep = types.SimpleNamespace(remote=lambda *given: Started(task, given))
        return types.SimpleNamespace(options=lambda **how: keep)

    def wait(self, waiting):
        return waiting[:1], waiting[1:]

    def get(self, started):
        n = started.given[2]["n"]
        self.ran.append(n)
        if n in self.dying:
            self.dying.remove(n)
            raise Broken("the worker died")
        return started.task(*started.given)


def test_a_sweep_goes_on_where_it_was_left(tmp_path, monkeypatch):
    """What is there and did not fail stays; a failed run is kept under another name and tried again, with the values that are new."""
    notebook = example_notebook(
        tmp_path / "01_small.ipynb", "if n == 2 and not pathlib.Path(os.environ['REPAIRED']).exists(): 1 / 0"
    )
    monkeypatch.setenv("REPAIRED", str(tmp_path / "repaired"))
    ray, out = RayInline(), tmp_path / "sweep"
    monkeypatch.setattr(sweeping, "_ray", lambda address, workers: contextlib.nullcontext((ray, None)))
    again = lambda *values: sweep_chapter(notebook, {"n": list(values)}, out=out, progress=False)

    first = again(1, 2, 3)
    assert [bool(run.error) for run in first] == [False, True, True] and ray.ran == [1, 2, 3]
    assert "ZeroDivisionError" in first[1].error and "the worker died" in first[2].error
    assert {p.name for p in out.iterdir()} == {"n=1,preset=cpu", "n=2,preset=cpu", "sweep.json", "rows.jsonl"}
    summary = out / "n=1,preset=cpu" / "summary.json"
    written = summary.stat().st_mtime_ns

    (tmp_path / "repaired").touch()
    second = again(4, 3, 2, 1)
    assert not any(run.error for run in second) and ray.ran == [1, 2, 3, 4, 3, 2]
    assert summary.stat().st_mtime_ns == written
    assert "ZeroDivisionError" in json.loads((out / "n=2,preset=cpu.old-1" / "summary.json").read_text())["error"]
    assert not (out / "n=3,preset=cpu.old-1").exists()  # it left nothing
    recorded = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [(r["parameters"]["n"], r["row"]["sum"]) for r in recorded] == [(1, 0), (2, 1), (3, 3), (4, 6)]


@pytest.mark.slow
def test_the_rest_of_a_sweep_on_a_cluster(notebook, tmp_path):
    """The rest, with one more value, on a cluster with a GPU."""
    out, start, env = sweep_of_three(notebook, tmp_path)
    summary = out / "n=1,preset=gpu" / "summary.json"
    written = summary.stat().st_mtime_ns
    (tmp_path / "repaired").touch()
    with cluster(**env) as address:
        second = start("-g", "n=4,3,2,1", "--address", address)
    assert second.returncode == 0 and "4/4" in second.stderr, second.stderr
    rows = [line for line in second.stdout.splitlines() if line.startswith("| ")]
    assert [tuple(r.split(" | ")[2:4]) for r in rows[2:]] == [("4", "6"), ("3", "3"), ("2", "1"), ("1", "0")] and all(
        r.endswith("finished |") for r in rows[2:]
    )
    assert summary.stat().st_mtime_ns == written
    assert "too many" in json.loads((out / "n=2,preset=gpu.old-1" / "summary.json").read_text())["error"]
    for n in (1, 2, 3, 4):
        folder = out / f"n={n},preset=gpu"
        assert {p.name for p in folder.iterdir()} == {"small.ipynb", "small.html", "summary.json", "results"}
        where = json.loads((folder / "results" / "where.jsonl").read_text())
        assert where["gpu"] == ("" if n == 1 else "0") and ("_ray_pkg_" in where["library"]) == (n != 1)
    recorded = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [(r["parameters"]["n"], r["row"]["sum"]) for r in recorded if r["file"] == "small.jsonl"] == [
        (1, 0),
        (2, 1),
        (3, 3),
        (4, 6),
    ]


@pytest.fixture
def short():
    """A folder for Ray: the path of a socket in it must be short."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.slow
def test_interrupted(tmp_path, short):
    """Ctrl-C ends the sweep, its Ray and the kernels, leaves no file of theirs, and says what is done."""
    notebook = example_notebook(
        tmp_path / "slow.ipynb",
        "import time\nif n > 1:\n    pathlib.Path(os.environ['SWEEP_TEST'], 'slow').touch()\n    time.sleep(600)",
    )
    sweep = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "attnbook",
            "sweep",
            str(notebook),
            "-g",
            "n=1,2",
            "--workers",
            "1",
            "--out",
            str(tmp_path / "sweep"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SWEEP_TEST": str(tmp_path), "RAY_TMPDIR": short},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell starts background jobs with SIGINT ignored
    family = []
    try:
        end = time.monotonic() + 240
        while not (tmp_path / "slow").exists():
            assert sweep.poll() is None and time.monotonic() < end, sweep.communicate()
            time.sleep(0.2)
        family = psutil.Process(sweep.pid).children(recursive=True)
        assert any("ipykernel" in " ".join(p.cmdline()) for p in family) and any("raylet" in p.name() for p in family)
        sweep.send_signal(signal.SIGINT)
        said = sweep.communicate(timeout=60)[1]
        assert sweep.returncode == 130 and "stopped; 1 of 2 runs are done" in said and "Traceback" not in said
        end = time.monotonic() + 30
        while alive(family):
            assert time.monotonic() < end, alive(family)
            time.sleep(0.2)
    finally:
        for p in [*alive(family), sweep]:
            p.kill()
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == ["n=1,preset=cpu", "sweep.json"]
    assert not os.listdir(short)
