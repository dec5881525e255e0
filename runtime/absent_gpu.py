"""Compile a model for an NVIDIA GPU that this machine does not have, and count what its kernels move.

    python -P runtime/absent_gpu.py FOLDER OPTIONS    # the model.py in FOLDER; OPTIONS and output are JSON

`bench.py compile` is the command for people, and has the options. This needs a build of torch with CUDA and
Triton, but no GPU and no driver: the graphs are traced with fake tensors on the CPU, moved to "cuda" and
lowered by Inductor, and ptxas compiles each Triton kernel. Nothing runs. So this shows which kernels there
are, that they compile, and how many bytes they have to read and write, and nothing about the speed of matrix
products or about numbers.

torch has no interface for this. What is replaced below was found by reading torch 2.14.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Card:
    """What the compiler asks about a GPU, and NVIDIA's data sheet: bytes/s, and dense FLOP/s in `dtype`."""

    name: str
    capability: int
    processors: int
    shared_bytes: int  # per block
    threads: int  # per processor
    memory: int
    bandwidth: float
    flops: float
    dtype: torch.dtype = torch.bfloat16


CARDS = {
    "h100": Card("h100", 90, 132, 232448, 2048, 80 << 30, 3.35e12, 989e12),
    "h200": Card("h200", 90, 132, 232448, 2048, 141 << 30, 4.8e12, 989e12),
    "a100": Card("a100", 80, 108, 166912, 2048, 80 << 30, 2.04e12, 312e12),
    "4090": Card("4090", 89, 128, 101376, 1536, 24 << 30, 1.01e12, 165e12),
    "t4": Card("t4", 75, 40, 65536, 1024, 16 << 30, 0.32e12, 65e12, torch.float16),
}
PASSES = ("training", "validation", "decoding")


def card_in(device_name: str) -> str | None:
    """Return the name of the card that a device such as "NVIDIA A100-SXM4-80GB" is, or None."""
    return next((name for name in CARDS if name in device_name.lower()), None)


def returning(value: object) -> Callable:
    return lambda *args, **options: value  # a new function for each call: dynamo tells them apart


def pretend(card: Card) -> None:
    """Make torch and Triton believe that the card is device 0."""
    from torch._dynamo import device_interface
    from torch._inductor import async_compile
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    major, minor = divmod(card.capability, 10)
    properties = types.SimpleNamespace(
        name=card.name,
        major=major,
        minor=minor,
        multi_processor_count=card.processors,
        total_memory=card.memory,
        warp_size=32,
        max_threads_per_multi_processor=card.threads,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=card.shared_bytes,
        shared_memory_per_multiprocessor=card.shared_bytes + 1024,
        L2_cache_size=50 << 20,
        clock_rate=1_700_000,
        memory_clock_rate=2_600_000,
        memory_bus_width=5120,
        gcnArchName="",
        is_integrated=False,
        is_multi_gpu_board=False,
        uuid="",
    )
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._cuda_getCurrentRawStream = returning(0)
    cuda, interface = torch.cuda, device_interface.CudaInterface
    for name in ("synchronize", "set_device", "_lazy_init", "set_rng_state"):
        setattr(cuda, name, returning(None))
    for name in ("current_device", "_exchange_device", "_maybe_exchange_device", "_get_device_index"):
        setattr(cuda, name, returning(0))
    cuda.is_available, cuda.device_count = returning(True), returning(1)
    cuda.is_bf16_supported = returning(card.dtype == torch.bfloat16)
    cuda.get_device_properties = cuda._get_device_properties = returning(properties)
    cuda.get_device_capability, cuda.get_device_name = returning((major, minor)), returning(card.name)
    cuda.get_rng_state = returning(torch.zeros(16, dtype=torch.uint8))
    cuda.is_current_stream_capturing = returning(False)
    for name in ("current_device", "exchange_device", "maybe_exchange_device", "get_raw_stream"):
        setattr(interface, name, staticmethod(returning(0)))
    interface.is_available, interface.device_count = staticmethod(returning(True)), staticmethod(returning(1))
    interface.get_compute_capability = staticmethod(returning(card.capability))
    interface.Worker.get_device_properties = staticmethod(returning(properties))
    interface.Worker.current_device = staticmethod(returning(0))

    sizes = dict(max_shared_mem=card.shared_bytes, max_num_regs=65536, warpSize=32)
    sizes["multiprocessor_count"] = card.processors

    class Driver:
        utils = types.SimpleNamespace(get_device_properties=returning(sizes))
        get_current_target = staticmethod(returning(GPUTarget("cuda", card.capability, 32)))
        get_current_device = get_current_stream = staticmethod(returning(0))
        set_current_device = staticmethod(returning(None))
        get_active_torch_device = staticmethod(returning(torch.device("cuda", 0)))
        get_device_interface = staticmethod(returning(torch.cuda))
        is_active = staticmethod(returning(True))

    driver.set_active(Driver())
    _triton.has_triton = _triton.has_triton_package = returning(True)
    for module in (async_compile, triton_helpers, triton_heuristics):
        for name in ("set_driver_to_gpu", "set_driver_to_cpu"):
            if hasattr(module, name):
                setattr(module, name, returning(None))
    # These load the compiled kernels onto the device.
    tuner = triton_heuristics.CachingAutotuner
    tuner._make_launchers = tuner._dynamic_scale_rblock = returning(None)


class Counter:
    """What Inductor has compiled: bytes read and written by kind of kernel, peak memory, Triton kernels."""

    def __init__(self):
        import triton
        from torch._inductor.graph import GraphLowering

        self.kinds: dict[str, list[int]] = {}  # each with a number of kernels and their bytes
        self.peak_bytes = self.kernels = 0
        lower, compile_kernel = GraphLowering.compile_to_module, triton.compile

        def compile_and_count(*args, **options):
            self.kernels += 1
            return compile_kernel(*args, **options)

        def lower_and_count(graph: GraphLowering):
            module = lower(graph)
            self.count(graph)
            return module

        triton.compile, GraphLowering.compile_to_module = compile_and_count, lower_and_count

    def count(self, graph) -> None:
        from torch._inductor.memory import prepare_planning_info
        from torch.utils._ordered_set import OrderedSet

        self.kinds = collections.defaultdict(lambda: [0, 0])
        scheduler = graph.scheduler
        for node in scheduler.nodes:
            kind = self.kinds[kind_of(node)]
            kind[0] += 1
            # Kernels with several results have their bytes in the parts.
            with contextlib.suppress(NotImplementedError, AttributeError):
                kind[1] += node.get_read_write_buffers_sizes()
        names = scheduler.name_to_buf, scheduler.name_to_fused_node
        inputs, outputs = OrderedSet(graph.graph_inputs), OrderedSet(graph.get_output_names())
        self.peak_bytes, _ = prepare_planning_info(scheduler.nodes, *names, inputs, outputs)


def kind_of(node) -> str:
    """Return the operations that a kernel was generated for, or the name of a library's function."""
    if type(node).__name__ == "ExternKernelSchedulerNode":
        name = getattr(node.node, "python_kernel_name", None) or type(node.node).__name__
        return f"library: {name.removeprefix('extern_kernels.').removeprefix('torch.ops.aten.')}"
    parts = [getattr(part, "node", None) for part in node.get_nodes()]
    origins = {str(origin.target) for part in parts for origin in getattr(part, "origins", ())}
    names = {name.removeprefix("aten.").removeprefix("prims.").split(".")[0] for name in origins}
    return ", ".join(sorted(names - {"reshape", "permute", "slice", "unsqueeze", "view"}))


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **_) -> torch.Tensor:
    """Call the kernel that a GPU would choose; on the CPU's fake tensors, torch chooses another one."""
    aten = torch.ops.aten
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    bias = bias.expand(q.size(0), q.size(1), q.size(2), k.size(2))
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, dropout_p)[0]


def trace(model_module: types.ModuleType, args: argparse.Namespace, dtype: torch.dtype) -> list[tuple]:
    """Return the graphs of a pass, as (kind, module, inputs), called as train.py and sample.py do it."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.replace_random import replace_random_passes
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    graphs: list[tuple] = []
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

    def partition(joint: torch.fx.GraphModule, *inputs, **options) -> tuple:
        with V.set_fake_mode(fake_mode):
            replace_random_passes(joint)  # the one pass over the joint graph that dropout needs
        return min_cut_rematerialization_partition(joint, *inputs, **options)

    def keep(kind: str) -> Callable:
        return lambda module, inputs: graphs.append((kind, module, inputs)) or module

    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        inference_compiler=keep(args.what),
        decompositions=select_decomp_table(),
        partition_fn=partition,
    )
    sizes = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, block_size=args.block_size)
    autocast = torch.autocast("cpu", dtype=dtype)
    if args.what == "decoding":
        torch.set_default_dtype(dtype)  # of the weights
    with fake_mode:
        model = model_module.GPT(model_module.GPTConfig(**sizes, dropout=args.dropout))
        model.recompute = args.recompute
        idx = torch.zeros(args.batch_size, args.block_size, dtype=torch.int64)
        if args.what == "training":
            with autocast:
                loss = torch.compile(model, fullgraph=True, backend=backend)(idx, idx)[1]
            loss.backward()
        elif args.what == "validation":
            with autocast, torch.no_grad():
                torch.compile(model, fullgraph=True, backend=backend)(idx, idx)
        else:
            model.eval()
            cache, slots = model.new_cache(args.block_size), torch.zeros(1, dtype=torch.int64)
            mask = torch.ones(args.batch_size, 1, 1, args.block_size, dtype=torch.bool)
            shape = args.batch_size, args.n_head, args.block_size, args.n_embd // args.n_head

            def logits(idx: torch.Tensor) -> torch.Tensor:
                return model.lm_head(model.trunk(idx, idx, mask, cache, slots)[:, -1])

            with torch.no_grad():
                for layer in cache:  # on GPUs, the cache has the model's dtype
                    layer.k, layer.v = (torch.zeros(shape, dtype=dtype) for _ in range(2))
                torch.compile(logits, fullgraph=True, backend=backend)(idx[:, :1])
    return graphs


def lower(kind: str, module: torch.fx.GraphModule, inputs: list, counter: Counter) -> dict:
    """Move a graph to the card, compile it and return what was counted."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    cuda = torch.device("cuda", 0)
    for node in module.graph.nodes:
        for part in ("args", "kwargs"):
            moved = torch.fx.node.map_aggregate(
                getattr(node, part), lambda value: cuda if isinstance(value, torch.device) else value
            )
            setattr(node, part, moved)
        node.meta.pop("val", None)
    module.recompile()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=cuda)
            if isinstance(each, torch.Tensor)
            else each
            for each in inputs
        ]
        FakeTensorProp(module, mode=mode).propagate_dont_convert_inputs(*fakes)
    outputs = [node for node in module.graph.output_node().args[0] if isinstance(node, torch.fx.Node)]
    kept = {}
    for node in outputs if kind == "forward" else ():
        value = node.meta.get("val")
        if node.op != "placeholder" and isinstance(value, torch.Tensor):
            kept[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    started, before = time.perf_counter(), counter.kernels
    with tracing(TracingContext(mode)):
        settings = dict(is_backward=kind == "backward", is_inference=kind not in ("forward", "backward"))
        compile_fx_inner(module, fakes, **settings, static_input_idxs=(), cudagraphs=False)
    return {
        "kind": kind,
        "nodes": len(module.graph.nodes),
        "kernels": counter.kernels - before,
        "seconds": time.perf_counter() - started,
        "kept_bytes": sum(kept.values()),
        "peak_bytes": counter.peak_bytes,
        "kinds": dict(counter.kinds),
    }


def main(folder: str, args: argparse.Namespace) -> None:
    from torch._inductor import config

    card = CARDS[args.card]
    config.compile_threads, config.force_disable_caches = 1, True
    pretend(card)
    sys.path.insert(0, folder)
    os.chdir(folder)
    model_module = importlib.import_module("model")
    counter, F.scaled_dot_product_attention = Counter(), attention
    if rows := getattr(model_module, "head_rows", None):  # the graphs are traced on the CPU
        model_module.head_rows = lambda device, *sizes: rows(torch.device("cuda"), *sizes)
    started, available = time.perf_counter(), torch.cuda.is_available
    torch.cuda.is_available = returning(False)  # fake tensors must not look for a driver
    graphs = trace(model_module, args, card.dtype)
    torch.cuda.is_available = available
    record = {"card": card.name, "dtype": str(card.dtype), "trace_seconds": time.perf_counter() - started}
    record["graphs"] = [lower(*graph, counter) for graph in graphs]
    print(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], argparse.Namespace(**json.loads(sys.argv[2])))
