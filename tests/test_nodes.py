"""Two network namespaces stand for two nodes: own addresses, own processes, one file system. And the files of docs/."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
RELAUNCH = DOCS / "relaunch.sh"
ADDRESS = ("192.0.2.1", "192.0.2.2")  # of the range that is kept for examples
MODULE = ["-m", "styleloom.scripts.train"]
KIMG, LAST = 0.16, "nimg-000000160"


def ip(*args: str) -> str:
    """What `ip ARGS` prints."""
    return subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=20).stdout


class Nodes:
    """Two namespaces, joined by a pair of virtual interfaces; the processes that are started in them."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.started = logs, []
        self.names = [f"loom{os.getpid()}n{i}" for i in range(2)]
        self.links = [f"loom{os.getpid()}v{i}" for i in range(2)]  # at most 15 characters

    def up(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        (one, two), (a, b) = self.names, self.links
        ip("link", "add", a, "netns", one, "type", "veth", "peer", "name", b, "netns", two)
        for name, link, address in zip(self.names, self.links, ADDRESS, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", link, "up")

    def down(self) -> None:
        """Ends everything and removes everything, however far `up` came."""
        for process, _ in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # relaunch.sh first, or it would start others
        for process, _ in self.started:
            process.wait(20)
        for i, name in enumerate(self.names):
            if Path("/run/netns", name).exists():
                self.kill(i)
                ip("netns", "del", name)  # and its interface, and with it the other's

    def start(self, node: int, *command: object) -> None:
        """Starts a command on a node. relaunch.sh as its first word runs outside, as a scheduler does."""
        outside = [word for word in command[:1] if word == RELAUNCH]
        words = [*outside, "ip", "netns", "exec", self.names[node], *command[len(outside) :]]
        log = self.logs / f"{len(self.started)}-node{node}.txt"
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "RELAUNCH_WAIT": "1"}
        environment["GLOO_SOCKET_IFNAME"] = self.links[node]
        with log.open("w") as file:
            process = subprocess.Popen(
                list(map(str, words)), env=environment, stdout=file, stderr=file, start_new_session=True
            )
        self.started.append((process, log))

    def both(self, launcher: Callable[[int], list[str]], *arguments: str, again: bool = False) -> None:
        """Starts training under a launcher on both nodes; `again`: and, whenever it fails, once more."""
        for node in range(2):
            self.start(node, *([RELAUNCH] if again else []), *launcher(node), *arguments)

    def said(self) -> list[str]:
        """What the two nodes' last commands printed so far."""
        return [log.read_text() for _, log in self.started[-2:]]

    def link(self, state: str) -> None:
        """The network between the nodes: "up" or "down"."""
        ip("-n", self.names[1], "link", "set", self.links[1], state)

    def kill(self, node: int) -> None:
        """Every process of a node, at once: the power is gone."""
        for pid in ip("netns", "pids", self.names[node]).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def end(self, seconds: float = 120) -> list[str]:
        """What the last two said, which have to end well."""
        limit = time.monotonic() + seconds
        for node, (process, _) in enumerate(self.started[-2:]):
            try:
                status: int | None = process.wait(max(1, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = None
            assert status == 0, (node, status, *(text[-4000:] for text in self.said()))
        return self.said()


@pytest.fixture
def nodes(tmp_path):
    """The two nodes; skipped where namespaces are not to be had."""
    if not sys.platform.startswith("linux") or not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("needs Linux, root and `ip`")
    nodes = Nodes(tmp_path)
    try:
        nodes.up()
    except subprocess.CalledProcessError as error:
        nodes.down()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield nodes
    nodes.down()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, arguments, unlabelled, python):
    """The run that all the others have to equal: two processes of one machine."""
    out = tmp_path_factory.mktemp("nodes") / "undisturbed"
    process = python(*MODULE, *arguments(unlabelled, out, f"--total-kimg={KIMG}"), ranks=2)
    said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return out


def torchrun(node: int) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--node-rank", str(node), "--master-addr", ADDRESS[0], "--master-port", "29500", *MODULE),
    ]


def accelerate(node: int) -> list[str]:
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"),
        *("--num_processes", "2", "--machine_rank", str(node), "--main_process_ip", ADDRESS[0]),
        *("--main_process_port", "29500", *MODULE),
    ]


def weights(out: Path) -> dict[str, bytes]:
    """Every tensor file of the last checkpoint and the last snapshot."""
    folders = out / "checkpoints" / LAST, out / "snapshots" / LAST
    return {
        f"{x.parent.parent.name}/{x.name}": x.read_bytes() for f in folders for x in sorted(f.glob("*.safetensors"))
    }


def same(out: Path, expected: Path) -> None:
    found, its = weights(out), weights(expected)
    assert found.keys() == its.keys()
    assert len(its) > 2
    assert not [name for name in its if found[name] != its[name]]


def until(happened: Callable[[], object], seconds: float = 90) -> None:
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up, "it does not happen"
        time.sleep(0.01)


def saved(out: Path) -> list[Path]:
    return list(out.glob("checkpoints/nimg-?????????"))


@pytest.mark.netns
def test_two_nodes(nodes, tmp_path, arguments, unlabelled, undisturbed):
    """Half the run under torchrun and the other half under accelerate launch give the bits of one machine's run."""
    out = tmp_path / "out"
    nodes.both(torchrun, *arguments(unlabelled, out, f"--total-kimg={KIMG / 2}"))
    main, other = nodes.end()
    assert "Done" in main
    assert "Done" not in other  # said once
    nodes.both(accelerate, *arguments(unlabelled, out, f"--total-kimg={KIMG}"))
    main, other = nodes.end()
    assert "Going on from" in main
    same(out, undisturbed)


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_lost_node(nodes, tmp_path, arguments, unlabelled, undisturbed, lost):
    """Every process of a node is killed; with relaunch.sh on both, the run goes on and ends as if undisturbed."""
    out = tmp_path / "out"
    nodes.both(torchrun, *arguments(unlabelled, out, f"--total-kimg={KIMG}"), again=True)
    until(lambda: saved(out))
    nodes.kill(lost)
    said = nodes.end()
    assert "relaunch: ended with 137" in said[lost]
    assert "relaunch: ended with 1;" in said[1 - lost]  # the other saw its connection close, and ended by itself
    assert "Going on from" in said[0]
    same(out, undisturbed)


@pytest.mark.netns
@pytest.mark.slow
def test_lost_network(nodes, tmp_path, arguments, unlabelled, undisturbed):
    """The network between the nodes fails. No connection closes; the watchdog ends both sides, which start again."""
    out = tmp_path / "out"
    command = arguments(unlabelled, out, f"--total-kimg={KIMG}", "--parallel.watchdog-s=5")
    nodes.both(torchrun, *command, again=True)
    until(lambda: saved(out))
    nodes.link("down")
    until(lambda: all("no sign of life" in text for text in nodes.said()))
    nodes.link("up")
    main, _ = nodes.end()
    assert "Going on from" in main
    same(out, undisturbed)


@pytest.fixture
def relaunch():
    """(command of bash, **environment) -> a running relaunch.sh around it."""
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    started: list[subprocess.Popen[str]] = []

    def start(command: str, **more: str) -> subprocess.Popen[str]:
        environment = os.environ | {"RELAUNCH_WAIT": "0"} | more
        words = ["bash", str(RELAUNCH), "bash", "-c", command]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=20)


def test_relaunch(relaunch, tmp_path):
    """Again until it ends well, but not for ever."""
    process = relaunch(f"echo once >> {tmp_path}/n; [ $(wc -l < {tmp_path}/n) = 3 ]")
    assert process.communicate(timeout=20)[1].count("again in 0 s") == 2
    assert process.returncode == 0
    process = relaunch("echo tried; exit 7", RELAUNCH_MAX="4")
    out, err = process.communicate(timeout=20)
    assert (out.count("tried"), process.returncode) == (4, 7)
    assert err.endswith("relaunch: ended with 7, 4 times in a row: given up.\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_relaunch_is_stopped(relaunch, tmp_path, number, status):
    """A signal is handed on, what then is saved is waited for, and nothing starts again; nor while it waits."""
    saves = f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 1' TERM; touch {tmp_path}/up"
    process = relaunch(f"{saves}; while :; do sleep 0.05; done")
    until((tmp_path / "up").exists, 20)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert (tmp_path / "saved").exists()
    assert "again" not in err
    process = relaunch("echo tried; exit 7", RELAUNCH_WAIT="60")
    assert process.stdout is not None
    assert process.stdout.readline() == "tried\n"
    time.sleep(0.3)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == status


@pytest.mark.parametrize("name", ["relaunch.sh", "slurm.sh"])
def test_script(name):
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    subprocess.run(["bash", "-n", DOCS / name], check=True, timeout=20)
    assert os.access(DOCS / name, os.X_OK)


def test_kubernetes():
    """The fields without which pods do not find each other, or a lost one ends the run."""
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((DOCS / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy needs
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    (container,) = pod["containers"]
    (words,) = container["args"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"--master-addr {job['metadata']['name']}-0.{pod['subdomain']} " in words
    assert '--node-rank "$JOB_COMPLETION_INDEX"' in words
    assert int(environment["NODES"]) == spec["completions"]
    assert int(environment["PROCESSES"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["terminationGracePeriodSeconds"] > int(environment["GRACE"])
    assert {each["mountPath"] for each in container["volumeMounts"]} == {"/data", "/dev/shm"}
