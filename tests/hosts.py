"""Two hosts on one machine: network namespaces with ssh behind a switch, and faults between them.

    python tests/hosts.py cut power          these experiments, as root on Linux, with iproute2,
                                             ssh and sshd; --help lists all
    python tests/hosts.py loop --faults 50   a run under random faults, restarted by a shell loop

Each experiment trains a small model with MLX's launcher over ssh, disturbs it, and prints what the
user sees and when. A try has namespaces of its own, so several run at a time. The kernel, the
processors and the files are shared, and there is no real cable.
"""

import argparse
import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds to wait for anything
SSHD = "/usr/sbin/sshd"
SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
ListenAddress {address}
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
SetEnv XDG_CACHE_HOME={cache}
"""
SSH_CONFIG = """
Host *
IdentityFile {folder}/key
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile none
"""
# The loop of extras/README.md.
LOOP = """
for try in {{1..999}}; do
    {command} | tee -a {log} | grep "Run complete" && break
    pkill -f "^[^ ]*ssh .*{save_dir}"
    sleep 2
done
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


def missing_tool():
    """What is missing for Hosts with ssh on this machine, or None."""
    for tool in ("ip", "ssh", "ssh-keygen", SSHD):
        if not shutil.which(tool):
            return f"{tool} is not installed"
    if not Path(sys.prefix, "bin", "mlx.launch").exists():
        return "mlx.launch is not installed"
    return None


class Hosts:
    """Two hosts on a switch, each a network namespace; addresses: theirs.

    Raises subprocess.CalledProcessError on entry where namespaces are not permitted.
    """

    def __init__(self):
        self.id = os.urandom(2).hex()
        self.names = [f"h{i}-{self.id}" for i in range(2)]
        self.switch = f"sw-{self.id}"
        self.addresses = ["10.99.0.1", "10.99.0.2"]
        self.started = []  # processes

    def __enter__(self):
        try:
            ip("netns", "add", self.switch)
            ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "bridge", "up")
            for host in range(2):
                self.add(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        for host in range(2):
            self.kill_all(host)
        for process in self.started:
            process.wait()
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def add(self, host):
        """Connects a host to the switch."""
        name = self.names[host]
        cable = ["type", "veth", "peer", "e0", "netns", name]
        ip("netns", "add", name)
        ip("-n", self.switch, "link", "add", f"p{host}", *cable)
        ip("-n", self.switch, "link", "set", f"p{host}", "master", "bridge", "up")
        ip("-n", name, "addr", "add", f"{self.addresses[host]}/24", "dev", "e0")
        ip("-n", name, "link", "set", "e0", "up")
        ip("-n", name, "link", "set", "lo", "up")

    # -- ssh and MLX's launcher

    def serve(self, folder, cache, mounts=None):
        """Starts sshd on both hosts; its keys and files go to `folder`.

        cache: XDG_CACHE_HOME of the ranks; mounts: {host: [what, over what]}, other files there.
        """
        self.folder = folder
        for name in ("key", "host_key"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
            subprocess.run(keygen, check=True)
        public = (folder / "host_key.pub").read_text()
        known = [f"{address} {public}" for address in self.addresses]
        (folder / "known_hosts").write_text("".join(known))
        (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        # The launcher calls the first `ssh` in PATH.
        wrapper = folder / "bin" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        for host, address in enumerate(self.addresses):
            config = SSHD_CONFIG.format(folder=folder, address=address, cache=cache)
            (folder / f"sshd{host}").write_text(config)
            self.serve_host(host, (mounts or {}).get(host))

    def serve_host(self, host, mount=None):
        """Starts sshd on one host, and waits for it."""
        # In this host, /run and what `mount` replaces are its own.
        script = "mount -t tmpfs run /run && mkdir /run/sshd && "
        if mount:
            script += f"mount --bind {mount[0]} {mount[1]} && "
        script += f"exec {SSHD} -D -e -f {self.folder}/sshd{host}"
        log = (self.folder / f"sshd{host}.log").open("w")
        self.start(host, ["sh", "-c", script], stdout=log, stderr=log)
        while "listening" not in (self.folder / f"sshd{host}.log").read_text():
            if self.started[-1].poll() is not None:
                raise RuntimeError((self.folder / f"sshd{host}.log").read_text())
            time.sleep(0.01)

    def start(self, host, command, **options):
        """Starts a command in the namespace of a host."""
        command = ["ip", "netns", "exec", self.names[host], *map(str, command)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, **options)
        self.started.append(process)
        return process

    def launch_command(self, flags, program=("main.py",), launcher=()):
        """`mlx.launch --hosts A,B -- python main.py FLAGS`, a list of words."""
        command = ["mlx.launch", "--hosts", ",".join(self.addresses), *launcher, "--"]
        return [*command, sys.executable, *program, *map(str, flags)]

    def launch(self, command, **options):
        """Starts a command of launch_command on the first host; its output goes to launch.log."""
        path = f"{self.folder}/bin:{sys.prefix}/bin:{os.environ['PATH']}"
        with (self.folder / "launch.log").open("w") as log:
            env = os.environ | {"PATH": path}
            return self.start(0, command, cwd=ROOT, env=env, stdout=log, stderr=log, **options)

    def output(self):
        """What `launch` has shown so far; ssh gives the ranks terminals, whose lines end in \\r."""
        return (self.folder / "launch.log").read_text(errors="replace").replace("\r", "\n")

    def wait_for(self, words):
        """Waits until what was started last has shown `words`, a regular expression."""
        deadline = time.monotonic() + LIMIT
        while True:
            has_ended = self.started[-1].poll() is not None
            if re.search(words, self.output()):
                return
            if has_ended or time.monotonic() > deadline:
                raise TimeoutError(f"{words!r} is not in:\n{self.output()}")
            time.sleep(0.05)

    def processes(self, host):
        """The processes in a host besides sshd, {pid: words of its command}."""
        found = {}
        for pid in self.pids(host):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if words[0] and "sshd" not in words[0]:  # "" is a process that has ended
                    found[pid] = words[:-1]
        return found

    def pids(self, host):
        command = ["ip", "netns", "pids", self.names[host]]
        listing = subprocess.run(command, capture_output=True, text=True)
        return [int(pid) for pid in listing.stdout.split()]

    def pid(self, who):
        """The process of "rank0", "rank1" or "launcher"; None if there is none."""
        for pid, words in self.processes(1 if who == "rank1" else 0).items():
            is_python = Path(words[0]).name.startswith("python")
            is_launcher = is_python and words[1].endswith("mlx.launch")
            if is_python and is_launcher == (who == "launcher"):
                return pid
        return None

    def kill(self, who, number=signal.SIGKILL):
        """Signals the process that `pid` finds; returns whether there was one."""
        pid = self.pid(who)
        if pid is not None:
            os.kill(pid, number)
        return pid is not None

    def wait_until_gone(self, who, seconds):
        """How long it takes until a process has ended; None if it has not in time."""
        began = time.monotonic()
        while self.pid(who) is not None:
            if time.monotonic() > began + seconds:
                return None
            time.sleep(0.2)
        return time.monotonic() - began

    def wait_until_empty(self):
        """Waits until no process is left on any host; raises TimeoutError if one is."""
        deadline = time.monotonic() + LIMIT
        while left := self.processes(0) | self.processes(1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{left} are left, after:\n{self.output()}")
            time.sleep(0.2)

    # -- Faults

    def cut(self, host):
        """Pulls the cable of a host at the switch, which the other one does not see."""
        ip("-n", self.switch, "link", "set", f"p{host}", "down")

    def heal(self, host):
        ip("-n", self.switch, "link", "set", f"p{host}", "up")

    def kill_all(self, host):
        """Ends all processes in a host, sshd included."""
        for pid in self.pids(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut_power(self, host):
        """A host vanishes without a word."""
        self.cut(host)
        self.kill_all(host)
        ip("-n", self.switch, "link", "del", f"p{host}")
        ip("netns", "del", self.names[host])

    def restore_power(self, host):
        """A host that has vanished starts again."""
        self.add(host)
        self.serve_host(host)

    def limit_rate(self, rate):
        """Limits the link of each host in both directions; rate: as tc has it, like 100mbit."""
        queue = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
        for host, name in enumerate(self.names):
            for namespace, device in ((self.switch, f"p{host}"), (name, "e0")):
                subprocess.run(
                    ["tc", "-n", namespace, "qdisc", "replace", "dev", device, *queue], check=True
                )

    def lose(self, percent):
        """Drops packets between the hosts at random."""
        rules = f"""
            table bridge faults {{
                chain forward {{
                    type filter hook forward priority 0;
                    numgen random mod 100 < {percent} drop
                }}
            }}"""
        subprocess.run(
            ["ip", "netns", "exec", self.switch, "nft", "-f", "-"],
            input=rules, text=True, check=True,
        )  # fmt: skip


# ---- Experiments --------------------------------------------------------------------------------

SIZES = {  # by the number of parameters
    "0.1M": ["--dim", 64, "--num_blocks", 2],
    "1M": ["--dim", 192, "--num_blocks", 2],
    "10M": ["--dim", 512, "--num_blocks", 3, "--steps_per_save", 4],
}
SLOW_SAVE = """
import sys, time
sys.path.insert(0, {root!r})
import main
plain = main.save
def save(run, interrupts):
    if run.iteration == 40:
        time.sleep(60)
    plain(run, interrupts)
main.save = save
sys.exit(main.main())
"""


class Try:
    """One try of an experiment: hosts, a run on them, and what was seen."""

    def __init__(self, hosts, folder, options, number):
        self.hosts = hosts
        self.options = options
        self.random = random.Random(f"{options.seed} {number}")
        self.save_dir = folder / "runs"
        text = folder / "text.txt"
        random_words = random.Random(0)
        words = [random_words.choice("one two three four five six".split()) for _ in range(20000)]
        text.write_text(" ".join(words))
        self.flags = ["--text", text, "--num_heads", 2, "--context_size", 32, "--batch_size", 8]
        self.flags += ["--max_tokens", 4, "--num_iters", options.steps, "--steps_per_save", 20]
        self.flags += ["--save_dir", self.save_dir, *SIZES[options.size]]
        self.seen = []

    def see(self, text):
        self.seen.append(text)

    def train(self, program=("main.py",)):
        """Starts a run, or resumes it, and waits for its first save."""
        launcher = self.hosts.launch(self.hosts.launch_command(self.flags, program))
        self.hosts.wait_for("saved .* at iteration")
        return launcher

    def see_end(self, *ranks):
        """Waits for the end of these ranks, and for their last words."""
        for rank in ranks:
            seconds = self.hosts.wait_until_gone(rank, LIMIT)
            self.see(f"{rank} " + ("stays" if seconds is None else f"ended +{seconds:.1f} s"))
        time.sleep(3)  # ssh and the launcher deliver them later
        lines = self.hosts.output().splitlines()
        own = [line for line in lines if line.startswith("main.py: ")]
        self.see(f"{len(own)} line(s), {own[:1]}")

    def see_progress(self):
        """Waits for one more save."""
        before = self.iteration()
        deadline = time.monotonic() + LIMIT
        while self.iteration() == before:
            if time.monotonic() > deadline:
                raise TimeoutError("no progress")
            time.sleep(0.1)
        self.see(f"goes on: saved at {before}, then {self.iteration()}")

    def iteration(self):
        """That of the last save which was shown."""
        saved = re.findall(r"saved \w+ at iteration ([\d,]+)", self.hosts.output())
        return int(saved[-1].replace(",", ""))

    def see_resume(self):
        """Reruns the command, once no process is left, then stops it."""
        before = self.iteration()
        self.hosts.wait_until_empty()
        self.train()
        resumed = re.search("from iteration ([\\d,]+)", self.hosts.output())[1]
        self.see(f"saved at {before}, resumed at {resumed}")
        self.stop()

    def stop(self):
        self.hosts.kill("rank0", signal.SIGTERM)
        self.see_end("rank0", "rank1")
        self.hosts.wait_until_empty()


def cut(this):
    """The cable of one host is pulled."""
    process = this.train()
    this.hosts.cut(this.options.host)
    this.see_end("rank0", "rank1")
    this.hosts.heal(this.options.host)
    process.wait(LIMIT)
    this.see_resume()


def power(this):
    """One host vanishes with all its processes."""
    process = this.train()
    this.hosts.cut_power(this.options.host)
    this.see_end(f"rank{1 - this.options.host}")
    this.hosts.restore_power(this.options.host)
    process.wait(LIMIT)
    this.see_resume()


def pause(this):
    """One rank is stopped for a minute, then continues."""
    this.train()
    rank = f"rank{this.options.host}"
    this.hosts.kill(rank, signal.SIGSTOP)
    time.sleep(60)
    this.hosts.kill(rank, signal.SIGCONT)
    this.see_progress()
    this.stop()


def loss(this):
    """5 % of the packets are lost at 100 Mbit/s, for a minute."""
    this.hosts.limit_rate("100mbit")
    this.train()
    this.hosts.lose(5)
    time.sleep(60)
    this.see_progress()
    this.stop()


def save(this):
    """A save takes a minute."""
    this.train(["-c", SLOW_SAVE.format(root=str(ROOT))])
    this.hosts.wait_for("at iteration 40")
    this.see_progress()
    this.stop()


def launcher(this):
    """The launcher is killed."""
    this.train()
    this.hosts.kill("launcher")
    this.see_end("rank0", "rank1")
    this.see_resume()


def loop(this):
    """Random faults strike a run that a shell loop restarts; it ends as one without."""
    hosts = this.hosts
    hosts.launch(hosts.launch_command(this.flags)).wait()
    undisturbed = newest_id(this.save_dir)
    shutil.rmtree(this.save_dir)
    hosts.limit_rate("100mbit")
    log = hosts.folder / "train.log"
    command = shlex.join(hosts.launch_command(this.flags))
    script = LOOP.format(command=command, log=log, save_dir=this.save_dir)
    shell = hosts.launch(["bash", "-c", script])
    struck = []
    while len(struck) < this.options.faults and shell.poll() is None:
        saves = log.read_text(errors="replace").count("saved ") if log.exists() else 0
        time.sleep(this.random.uniform(0.1, 8))
        fault = this.random.choice(FAULTS)
        if log.exists() and log.read_text(errors="replace").count("saved ") == saves:
            continue  # it is restarting
        if strike(this, fault):
            struck.append(fault)
    shell.wait()
    text = log.read_text(errors="replace")
    this.see(f"{len(struck)} faults: {[(each, struck.count(each)) for each in FAULTS]}")
    this.see(f"{text.count('from iteration')} legs, {text.count('Traceback')} tracebacks")
    this.see(f"undisturbed {undisturbed}, disturbed {newest_id(this.save_dir)}")
    hosts.wait_until_empty()


FAULTS = ["kill rank0", "kill rank1", "kill launcher", "stop rank0", "stop rank1"]
FAULTS += ["freeze rank0", "freeze rank1", "cut 0", "cut 1", "long cut 0", "long cut 1"]


def strike(this, fault):
    """Makes one of FAULTS happen; returns whether it could."""
    *action, victim = fault.split()
    if action == ["kill"]:
        return this.hosts.kill(victim)
    if action == ["stop"]:
        return this.hosts.kill(victim, signal.SIGTERM)
    if action == ["freeze"]:
        has_stopped = this.hosts.kill(victim, signal.SIGSTOP)
        time.sleep(this.random.uniform(1, 10))
        this.hosts.kill(victim, signal.SIGCONT)
        return has_stopped
    this.hosts.cut(int(victim))
    time.sleep(80 if action[0] == "long" else this.random.uniform(1, 10))
    this.hosts.heal(int(victim))
    return True


def speed(this):
    """Milliseconds per step of one process, and of two hosts at several rates."""
    this.hosts.start(0, [sys.executable, "main.py", *this.flags], cwd=ROOT).wait()
    this.see(f"one process {milliseconds(this.save_dir):.0f} ms")
    for rate in (None, "1gbit", "100mbit"):
        shutil.rmtree(this.save_dir)
        if rate:
            this.hosts.limit_rate(rate)
        this.hosts.launch(this.hosts.launch_command(this.flags)).wait()
        this.see(f"{rate or 'no limit'} {milliseconds(this.save_dir):.0f} ms")


def newest_id(save_dir):
    """The id of the checkpoint saved last."""
    paths = save_dir.glob("*/*.safetensors")
    return max(paths, key=os.path.getmtime).stem


def milliseconds(save_dir):
    """The time of a step, from the tokens per second of the last report."""
    [log] = save_dir.glob("*/log.jsonl")
    speeds = re.findall(r'"tokens_per_second": ([\d.]+)', log.read_text())
    return 1000 * 8 * 32 / float(speeds[-1])


ALL = (cut, power, pause, loss, save, launcher, loop, speed)
EXPERIMENTS = {each.__name__: each for each in ALL}


def run_try(name, number, options, opened):
    """Makes one try of an experiment, and prints what was seen; opened: a list for its Hosts."""
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    with Hosts() as hosts:
        opened.append(hosts)
        hosts.serve(folder, options.cache)
        this = Try(hosts, folder, options, number)
        try:
            EXPERIMENTS[name](this)
        except Exception as error:
            this.see(f"FAILED, see {folder}: {error!r}")
        else:
            shutil.rmtree(folder)
    title = f"{name} {options.size} host {options.host}, try {number}:"
    print(title, *this.seen, sep="\n    ", flush=True)


def run(argv=None):
    epilog = "\n".join(f"{name:8}{each.__doc__}" for name, each in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--host", type=int, default=1, choices=[0, 1], help="the one that is hit")
    parser.add_argument("--size", default="0.1M", choices=SIZES, help="number of parameters")
    parser.add_argument("--steps", type=int, default=100000, help="length of a run")
    parser.add_argument("--faults", type=int, default=50, help="of `loop`")
    parser.add_argument("--tries", type=int, default=1, help="of each experiment")
    parser.add_argument("--at_once", type=int, default=3, help="how many run at a time")
    parser.add_argument("--seed", type=int, default=1, help="of what is random")
    parser.add_argument("--cache", default=str(Path.home() / ".cache"), help="see fast.py")
    options = parser.parse_args(argv)
    if os.geteuid() or missing_tool():
        parser.error(missing_tool() or "network namespaces need root")
    opened = []

    def stop(number, frame):
        for hosts in opened:
            hosts.__exit__()
        os._exit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    with ThreadPoolExecutor(options.at_once) as pool:
        for name in options.experiments:
            for number in range(options.tries):
                pool.submit(run_try, name, number, options, opened)


if __name__ == "__main__":
    run()
