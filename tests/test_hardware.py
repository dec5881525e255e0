"""Kernels, compilers, cores and memory."""

import os
import resource
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, TINY, begin, read_losses
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import get_compile_threads
from torch.nn import functional as F

import bench
import fineweb
import hellaswag
import sample
from model import GPT, GPTConfig
from runtime import hardware, machine
from runtime.launcher import Launcher


@pytest.mark.parametrize("options", ["--dtype float32", "--dtype bfloat16", "--dropout 0.1"])
def test_reported_attention_backend_is_the_one_that_runs(run_train, capsys, options):
    with torch.profiler.profile() as profile:
        run_train(f"{options} --warmup_steps 0 --max_steps 1 --val_every 0 --checkpoint_every 0")
    ran = {event.key for event in profile.key_averages()}
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in ran
    assert flash != ("aten::_softmax_backward_data" in ran)
    assert ("attention flash" if flash else "attention math") in capsys.readouterr().out


def test_chosen_gpu_becomes_the_current_one(monkeypatch):
    made, current = [], []

    def empty(size, device):
        made.append(device)
        return SimpleNamespace(device=device)

    monkeypatch.setattr(hardware.torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    alone, many = {"LOCAL_RANK": "3"}, {"MASTER_ADDR": "node", "MASTER_PORT": "1", "RANK": "9"}
    cases = [("cuda:1", {}, 1), ("cuda", {}, 0), ("cuda", alone, 0), ("cuda:1", alone, 1)]
    cases += [("cuda:1", {**many, "RANK": "0", "WORLD_SIZE": "1"}, 1)]
    cases += [("cuda", {**many, "WORLD_SIZE": "16"}, 3), ("cuda:1", {"LOCAL_RANK": "2"}, 2)]
    for name, environment, expected in cases:
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        assert hardware.choose_device(name) == torch.device("cuda", expected)
        assert made[-1] == current[-1] == torch.device("cuda", expected)  # no other GPU is touched
    assert hardware.choose_device("cpu").type == "cpu" and len(current) == len(cases)
    monkeypatch.delenv("LOCAL_RANK")  # as under Slurm or MPI
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert hardware.choose_device("cuda").index == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="^rank 9 cannot tell which .* LOCAL_RANK: start .* torchrun, or"):
        hardware.choose_device("cuda")


WHEELS = "--index-url https://download.pytorch.org/whl"
SMI_FAILS = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """Write a stand-in for nvidia-smi, on a machine without files of a GPU, whose torch finds none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.13.0+local")
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")

    def write(text: str, status: int = 0) -> None:
        Path("nvidia-smi").write_text(f'#!/bin/sh\necho "{text}"\nexit {status}\n')
        Path("nvidia-smi").chmod(0o755)

    return write


@pytest.mark.parametrize(
    ("cuda", "driver", "message"),
    [
        (
            "13.0",
            "550.54.15",
            "is built for CUDA 13.0, which needs driver 580 or newer. Use an image with a newer driver, `pip "
            f"install torch==2.13.0+cu126 {WHEELS}/cu126` (not for Blackwell GPUs), or --device cpu",
        ),
        (
            "12.6",
            "470.82.01",
            "is built for CUDA 12.6, which needs driver 525 or newer. Use an image with a newer driver, or "
            "--device cpu",
        ),
        (
            None,
            "580.65.06",
            f"is built for CPUs. Use `pip install torch==2.13.0+cu130 {WHEELS}/cu130`, or --device cpu",
        ),
        (
            None,
            "570.86.15",
            f"is built for CPUs. Use `pip install torch==2.13.0+cu126 {WHEELS}/cu126`, or --device cpu",
        ),
        (
            "13.0",
            "580.65.06",
            "cannot use it (system not yet initialized). Use another CUDA_VISIBLE_DEVICES, restart the "
            "machine or container, or --device cpu",
        ),
    ],
)
def test_gpu_that_torch_cannot_use_is_an_error(cuda, driver, message, monkeypatch, smi):
    def init():
        raise RuntimeError("system not yet initialized\nmore")

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", init)
    smi(f"NVIDIA H100 80GB HBM3, {driver}\nNVIDIA H100 80GB HBM3, {driver}")
    with pytest.raises(ValueError) as caught:
        hardware.choose_device("auto")
    assert str(caught.value) == f"NVIDIA H100 80GB HBM3, driver {driver}: torch 2.13.0 {message}"
    assert hardware.choose_device("cpu").type == "cpu"
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert hardware.choose_device("auto").type == "cpu"


def test_every_command_refuses_a_gpu_that_torch_cannot_use(smi, run_train):
    smi("NVIDIA H100 80GB HBM3, 550.54.15")
    commands = {sample: "--model x", hellaswag: f"--model x --data {hellaswag.DEMO_ITEMS}", bench: "memory"}
    calls = [lambda: run_train("--device auto")]
    calls += [lambda m=m, words=words: m.main(m.parse_args(words.split())) for m, words in commands.items()]
    for call in calls:
        with pytest.raises(ValueError, match="^NVIDIA H100 80GB HBM3, driver 550.54.15: "):
            call()
    assert not Path("log").exists()


@pytest.mark.parametrize(
    ("smi_text", "files", "driver"),
    [
        (None, {}, None),
        (None, {"version": DRIVER, "nvidiactl": "", "nvidia-uvm": ""}, None),  # no GPU
        (SMI_FAILS, {"version": DRIVER}, None),
        ("No devices were found", {"version": DRIVER}, None),
        (None, {"version": DRIVER, "nvidia3": ""}, "550.54.15"),  # a container without nvidia-smi
        (SMI_FAILS, {"version": OPEN_DRIVER, "nvidia0": ""}, "570.86.15"),
        (SMI_FAILS, {"nvidia0": ""}, "unknown"),
    ],
)
def test_files_of_a_driver_do_not_make_a_gpu_but_device_files_do(smi, smi_text, files, driver):
    for name, text in files.items():
        Path(name).write_text(text)
    if smi_text:
        smi(smi_text, status=9)
    if driver is None:
        assert hardware.choose_device("auto").type == "cpu"
    else:
        with pytest.raises(ValueError, match=f"^NVIDIA GPU, driver {driver}: torch 2.13.0 .*--device cpu$"):
            hardware.choose_device("auto")


HEADERS = f"python3.{sys.version_info.minor}-dev"


@pytest.mark.parametrize(
    ("programs", "header", "message"),
    [
        ([], True, "Triton needs a C compiler: `apt install build-essential`"),
        (["gcc"], False, f"Triton needs Python.h: `apt install {HEADERS}`"),
        ([], False, f"Triton needs a C compiler and Python.h: `apt install build-essential {HEADERS}`"),
        (["gcc"], True, r"Command 'cc' returned non-zero exit status 1\."),
    ],
)
def test_missing_compiler_is_an_error_on_a_gpu(programs, header, message, monkeypatch, tmp_path):
    def compiled(function):
        raise subprocess.CalledProcessError(1, "cc")

    for name in programs:
        Path(name).touch(0o755)
    if header:
        Path("Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(hardware.sysconfig, "get_config_var", lambda name: str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda function: compiled)
    monkeypatch.setattr(torch, "zeros", lambda size, device: size)
    message = f"^torch.compile does not work here: {message}"
    with pytest.raises(ValueError, match=f"{message}, or use train.py --no-compile$"):
        hardware.can_compile(torch.device("cuda", 0), print)
    with pytest.raises(ValueError, match=f"{message}, or leave out --compile$"):
        hardware.can_compile(torch.device("cuda", 0), print, "leave out --compile")


def test_the_chosen_gpu_is_synchronized_and_asked_for_its_memory(monkeypatch):
    asked, gpu = [], torch.device("cuda:1")
    for name, answer in (("synchronize", None), ("max_memory_reserved", 30), ("memory_reserved", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: asked.append(device) or answer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (50, 80))
    hardware.synchronize(gpu)
    assert hardware.memory(gpu) == (30, 40)
    assert asked == [gpu] * 4


CPU_V1, MEMORY_V1, V2 = "cgroup x rw,cpu,cpuacct", "cgroup x rw,memory", "cgroup2 x rw"
# The lines of /proc/self/cgroup, what is mounted (root, folder, type), the files there, and the cores and
# bytes that may be used, of 16 and 900.
CGROUPS = {
    "none": ("", [], {}, 16, 900),
    "v2": (
        "0::/a/b",
        [("/", "all", V2)],
        {"all/a/b/cpu.max": "150000 100000", "all/a/b/memory.max": "70"},
        2,
        70,
    ),
    "v2, limits of parents": (
        "0::/a/b",
        [("/", "all", V2)],
        {"all/a/b/cpu.max": "max 100000", "all/a/b/memory.max": "max", "all/a/cpu.max": "300000 100000"}
        | {"all/a/memory.max": "80", "all/memory.max": "90", "all/other/cpu.max": "1 1"},
        3,
        80,
    ),
    "v2, a container": (
        "0::/",
        [("/", "all", V2)],
        {"all/cpu.max": "1000 100000", "all/memory.max": "20"},
        1,
        20,
    ),
    "v2, a container that sees the host": (
        "0::/docker/1/job",
        [("/docker/1", "all", V2)],
        {"all/job/cpu.max": "400000 100000", "all/memory.max": "60"},
        4,
        60,
    ),
    "v1": (
        "4:memory:/a\n3:cpu,cpuacct:/b\n1:name=systemd:/c",
        [("/", "cpu,cpuacct", CPU_V1), ("/", "memory", MEMORY_V1), ("/", "none", "cgroup x rw,name=systemd")],
        {"cpu,cpuacct/b/cpu.cfs_quota_us": "250000", "cpu,cpuacct/b/cpu.cfs_period_us": "100000"}
        | {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
        | {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/a/memory.limit_in_bytes": "50"},
        3,
        50,
    ),
    "v1, a container that sees the host": (
        "4:memory:/docker/1",
        [("/docker/2", "memory", MEMORY_V1)],
        {"memory/memory.limit_in_bytes": "40"},
        16,
        40,
    ),
    "both": (
        "4:cpu,cpuacct:/a\n0::/b",
        [("/", "cpu", CPU_V1), ("/", "unified", V2)],
        {"cpu/a/cpu.cfs_quota_us": "500000", "cpu/a/cpu.cfs_period_us": "100000"}
        | {"unified/b/memory.max": "30"},
        5,
        30,
    ),
    "malformed": (
        "nonsense\n0::/a",
        [("/", "all", V2)],
        {"all/a/cpu.max": "150000", "all/cpu.max": "1 0"}
        | {"all/a/memory.max": "1 2", "all/memory.max": "\udcff"},
        16,
        900,
    ),
}


@pytest.fixture
def cgroups(monkeypatch, tmp_path):
    """Put this process into a setup of cgroups, on a machine with 16 cores and 900 bytes of memory."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(machine, "installed_memory", lambda: 900)

    def setup(name: str) -> None:
        lines, mounts, files, *_ = CGROUPS[name]
        mounted = [
            f"{number} 1 0:1 {root} {tmp_path / folder} rw,nosuid shared:9 - {kind}"
            for number, (root, folder, kind) in enumerate(mounts)
        ]
        files = files | {"proc/cgroup": lines, "proc/mountinfo": "\n".join([*mounted, "nonsense", ""])}
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f"{text}\n", errors="surrogateescape")

    return setup


def test_ranks_share_the_cores_that_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    # By then, an optimizer has imported Inductor, which has read the cores of the machine or the variable.
    cases = [(96, 8, None, 32, 12), (208, 1, None, 32, 32), (2, 8, None, 2, 1), (96, 8, "20", 20, 20)]
    for cores, ranks, before, default, threads in cases:
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
        if before:
            monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", before)
        monkeypatch.setattr(hardware, "usable_cores", lambda cores=cores: cores)
        monkeypatch.setattr(hardware, "read_launcher", lambda ranks=ranks: Launcher(local_world_size=ranks))
        with inductor_config.patch(compile_threads=default):  # monkeypatch would hide the setting afterwards
            assert hardware.can_compile(torch.device("cpu"), print)
            assert get_compile_threads() == threads


def test_open_files_are_allowed_as_far_as_the_system_does(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = machine.MOST_FILES if limits[1] < 0 else min(machine.MOST_FILES, limits[1])  # below 0: no limit
    try:
        for soft in (300, most, limits[0]):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
            machine.allow_open_files()
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (max(soft, most), limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    changed, endless = [], resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changed.append(limits))
    for found in [(256, 1024), (256, endless), (1024, 1024), (endless, endless)]:
        monkeypatch.setattr(resource, "getrlimit", lambda _, found=found: found)
        machine.allow_open_files()
    assert changed == [(1024, 1024), (4096, endless)]


def test_run_with_more_shards_than_files_that_may_be_open(shards, run_train):
    for number in range(100):
        shutil.copy(shards / "edufineweb_train_000001.npy", shards / f"edufineweb_train_{number + 9:06d}.npy")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (80, limits[1]))
        run_train("--max_steps 3")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_tf32_is_named_where_a_gpu_uses_it(monkeypatch):
    before, gpu = torch.get_float32_matmul_precision(), torch.device("cuda", 0)
    try:
        for capability, precision, used in [((9, 0), "high", 1), ((9, 0), "highest", 0), ((7, 5), "high", 0)]:
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
            torch.set_float32_matmul_precision(precision)
            assert hardware.uses_tf32(gpu) == bool(used)
    finally:
        torch.set_float32_matmul_precision(before)


def test_file_system_of_a_path_is_that_of_the_innermost_mount(monkeypatch, tmp_path):
    mounts = "1 0 0:1 / / rw - overlay overlay rw\n2 1 8:1 / /data rw,x shared:1 - ext4 /dev/sda rw\n"
    (tmp_path / "mountinfo").write_text(f"{mounts}3 1 0:2 / /data/my\\040disk rw - tmpfs tmpfs rw\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    found = {"/": "overlay", "/database": "overlay", "/data": "ext4", "/data/log": "ext4"}
    found["/data/my disk/a"] = "tmpfs"
    assert {path: machine.filesystem_of(Path(path)) for path in found} == found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_age_of_a_process_counts_from_its_start():
    code = "from runtime.machine import process_age as age; print(age(), age())"
    started = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    first, second = map(float, ran.stdout.split())
    assert 0 < first <= second < time.monotonic() - started + 0.02  # the kernel counts in ticks of 10 ms
    assert machine.process_age() > time.monotonic() - machine.IMPORTED


@pytest.mark.parametrize("name", CGROUPS)
def test_limits_of_cgroups_are_seen(cgroups, name):
    cgroups(name)
    assert (machine.usable_cores(), machine.usable_memory()) == CGROUPS[name][-2:]


def test_everything_uses_the_limits_of_a_container(cgroups, monkeypatch, run_train):
    cgroups("v2")
    cpu = torch.device("cpu")
    assert fineweb.parse_args([]).workers == 2
    assert hardware.describe_machine(cpu)["hardware"]["cpu_count"] == 2
    assert sum(hardware.memory(cpu)) == 70
    with pytest.raises(ValueError, match="needs at least .* GB, but 0.0 GB may be used here"):
        run_train()
    with pytest.raises(ValueError, match="not even --batch_size 1 fits"):
        run_train("--batch_size auto")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        hardware.choose_device("cpu")
        assert torch.get_num_threads() == 3  # as the user says
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(machine, "STAT", Path("nowhere"))  # all cores count as free
        hardware.choose_device("cpu")
        assert torch.get_num_threads() == 2
        hardware.choose_device("cpu", threads=9)
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        hardware.choose_device("cpu", threads=1)
        assert torch.get_num_threads() == 1  # of an option, or of the run that is resumed
    finally:
        torch.set_num_threads(threads)


# The ticks of each core: user, nice, system, idle, iowait, irq, softirq, steal.
@pytest.mark.parametrize(
    "cores, own_s, free",
    [
        (["0 0 0 20 0 0 0 0", "0 0 0 18 1 1 0 0", "9 9 9 99 0 0 0 0"], 0, 2),  # the third is not ours
        (["19 0 0 1 0 0 0 0", "0 1 0 18 0 0 0 0", "0 0 0 9 0 0 0 0"], 0, 1),  # one other process
        (["19 0 0 1 0 0 0 0", "0 1 0 18 0 0 0 0", "0 0 0 9 0 0 0 0"], 0.2, 2),  # a thread of this one
        (["10 0 0 10 0 0 0 0", "0 2 2 8 0 2 2 4", "0 0 0 9 0 0 0 0"], 0, 1),
        (["20 0 0 0 0 0 0 0", "0 0 20 0 0 0 0 0", "0 0 0 9 0 0 0 0"], 0, 1),  # at least one
    ],
)
def test_free_cores_are_those_that_others_leave_idle(tmp_path, monkeypatch, cores, own_s, free):
    stat = tmp_path / "stat"

    def write(times):
        lines = [f"cpu{number} {each} 7 7" for number, each in enumerate(times)]
        stat.write_text("\n".join(["cpu  9 9 9 9 9 9 9 9 7 7", *lines, "intr 1"]))

    write(["0 0 0 0 0 0 0 0"] * 3)
    monkeypatch.setattr(machine, "STAT", stat)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: write(cores))
    monkeypatch.setattr(machine.time, "process_time", iter([1.0, 1.0 + own_s]).__next__)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    assert machine.free_cores() == free


def test_run_keeps_the_number_of_threads_with_which_it_began(run_train, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(hardware, "usable_cores", lambda: 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(hardware, "free_cores", lambda: 1)
        run_train("--max_steps 3")
        assert "float32, eager, 1 thread(s)" in capsys.readouterr().out
        monkeypatch.setattr(hardware, "free_cores", lambda: 2)
        for options, threads in (
            ("--max_steps 4", 1),
            ("--max_steps 5 --threads 2", 2),
            ("--max_steps 6", 2),
        ):
            monkeypatch.setenv("OMP_NUM_THREADS", str(3 - threads))  # not that of the run
            records = run_train(f"{options} --resume")
            assert records["run"][-1]["args"]["threads"] == torch.get_num_threads() == threads
        assert "--threads 2 (was 1)" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)


def test_many_cores_do_not_start_as_many_tokenizers(monkeypatch):
    monkeypatch.setattr(fineweb, "usable_cores", lambda: 208)
    assert fineweb.parse_args([]).workers == fineweb.MOST_WORKERS < 208
    assert fineweb.parse_args(["--workers", "64"]).workers == 64


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity")
def test_cores_outside_the_affinity_are_not_counted():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert fineweb.parse_args([]).workers == machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_peak_memory_of_a_process_on_a_cpu():
    peak, left = hardware.memory(torch.device("cpu"))
    held = torch.ones(peak // 4 + 25_000_000)  # 100 MB more than ever
    higher, less = hardware.memory(torch.device("cpu"))
    assert higher - peak >= 100e6 - 1e6 and held.sum() > 0
    assert peak + left == higher + less == machine.usable_memory()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_emulated_dtype_warns_on_cpus(monkeypatch, recwarn, name):
    cpu, unit = torch.device("cpu"), {"bfloat16": "avx512_bf16", "float16": "amx_fp16"}[name]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
    assert hardware.choose_dtype(name, cpu) == getattr(torch, name) and not recwarn
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: False, "avx2": True})
    with pytest.warns(UserWarning, match=f"this CPU only emulates {name}: --dtype float32 is faster"):
        hardware.choose_dtype(name, cpu)
    assert hardware.choose_dtype("auto", cpu) == torch.float32


@pytest.fixture
def masked_calls(monkeypatch):
    """Whether cuDNN was allowed, for each call of attention with a mask and without."""
    allowed, attend = {True: [], False: []}, F.scaled_dot_product_attention

    def recorded(q, k, v, attn_mask=None, **options):
        allowed[attn_mask is not None].append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return allowed


def test_only_attention_without_a_mask_may_use_cudnn(run_train, masked_calls):
    assert torch.backends.cuda.cudnn_sdp_enabled()
    options = "--hellaswag_every 3 --hellaswag_data demo --block_size 64 --batch_size 1"
    run_train(f"{options} --sample_every 3")
    assert len(masked_calls[True]) > 20 and not any(masked_calls[True])
    assert len(masked_calls[False]) > 20 and all(masked_calls[False])


def test_out_of_memory_suggests_a_batch_size(shards):
    # RLIMIT_DATA, not RLIMIT_AS: CUDA maps more addresses than that without using them.
    sizes = "--vocab_size 500000 --batch_size 64 --total_batch_size 1024"
    process = begin(f"{TINY} {sizes}", errors="errors", data_bytes=1 << 30)
    process.join(timeout=120)
    assert process.exitcode == 1
    assert (
        Path("errors")
        .read_text()
        .splitlines()[-1]
        .startswith("train.py: error: out of memory with --batch_size 64: try --batch_size 32 or --recompute")
    )


def test_batch_size_auto_is_the_largest_that_fits(run_train, monkeypatch, capsys):
    chosen = run_train("--batch_size 4")
    auto = run_train("--batch_size auto")
    assert auto["run"][0]["args"]["batch_size"] == 4  # 64 tokens of 16 to a sequence
    assert [r["loss"] for r in auto["train"]] == [r["loss"] for r in chosen["train"]]
    model = GPT(GPTConfig(16, 320, 2, 2, 32))
    fits_2 = model.training_bytes(2, 16, torch.float32)
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 2 * fits_2 + 2)
    assert run_train("--batch_size auto")["run"][0]["args"]["batch_size"] == 2
    # Two ranks on this machine share twice as much.
    monkeypatch.setattr(hardware, "read_launcher", lambda: Launcher(local_world_size=2))
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 4 * fits_2 + 4)
    assert run_train("--batch_size auto")["run"][0]["args"]["batch_size"] == 2
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    with pytest.raises(ValueError, match="not even --batch_size 1 fits into memory: use --recompute"):
        run_train("--batch_size auto")


def test_missing_compiler_warns_once_and_terminal_shows_a_bar(shards, tmp_path):
    environment = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": ""}
    terminal, its_other_end = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    errors = os.ttyname(its_other_end)
    process = begin(f"{TINY} --compile --max_steps 3", "printed", errors, environment)
    process.join(timeout=120)
    output, bar = Path("printed").read_text(), os.read(terminal, 65536).decode()
    assert process.exitcode == 0, bar
    assert output.count("warning: torch.compile does not work here") == 1 and "float32, eager, " in output
    assert len(read_losses()) == 3
    assert "3/3" in bar and "step/s" in bar and "step/s" not in output


@pytest.mark.gpu
def test_gpu_batch_size_auto_trains_within_memory(run_train):
    # Many narrow layers: their activations fill any card, and little is computed with each byte of them.
    T, windows = 256, 2**14
    with torch.device("meta"):
        model = GPT(GPTConfig(block_size=T, vocab_size=320, n_layer=16, n_head=2, n_embd=64))
    needed = {2**i: model.training_bytes(2**i, T, torch.float32) for i in range(17)}
    memory = torch.cuda.get_device_properties(0).total_memory
    # All windows of a step at once need more than any card has; those of a micro-step fit into 8 GB.
    assert needed[windows] > 1.3 * 200e9 > memory and needed[2**8] < 0.6 * 8e9 < memory
    assert windows * T * model.flops_per_token(T) < 40e12  # seconds, also for a small card
    options = f"--device cuda --no-compile --n_layer 16 --n_embd 64 --block_size {T} --batch_size auto"
    options += f" --total_batch_size {windows * T} --max_steps 1 --warmup_steps 0 --val_every 0"
    (run,) = run_train(f"{options} --checkpoint_every 0")["run"]
    batch_size = run["args"]["batch_size"]
    assert needed[batch_size] < memory < needed[4 * batch_size]


def test_batch_that_exceeds_the_memory_of_the_machine_is_refused(run_train, monkeypatch):
    model = GPT(GPTConfig(16, 320, 2, 2, 32))
    needed = model.training_bytes(2, 16, torch.float32)
    monkeypatch.setattr(hardware, "usable_memory", lambda: needed)
    run_train("--max_steps 1 --warmup_steps 0")
    monkeypatch.setattr(hardware, "usable_memory", lambda: needed - 1)
    for check in ("", "--dry_run"):
        with pytest.raises(ValueError, match="--batch_size 2 needs at least 0.0 GB, but 0.0 GB may be used"):
            run_train(f"--max_steps 1 --warmup_steps 0 {check}", out_dir="other")
    assert not os.path.exists("other")
    with pytest.raises(ValueError, match="--batch_size 1 needs at least"):
        monkeypatch.setattr(hardware, "read_launcher", lambda: Launcher(local_world_size=8))
        run_train("--max_steps 1 --warmup_steps 0 --batch_size 1", out_dir="other")
