#!/usr/bin/env python3
"""The PyTorch peer: the phases as a careful PyTorch user would write them, timed on one GPU with random weights.

    peer.py --model smollm2 --phase orient --batch 32 --steps 5 --compile

Prints one JSON line. bf16 arithmetic over f32 masters, SDPA, fused AdamW, clipping at 1 (per layer in orient and
align), mamba_ssm's Triton scan. Memory is the rise of the device's used memory over its value before the first tensor.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

PHASES = ["teacher", "teacher-logits", "orient", "align", "distill", "check"]


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=["smollm2", "phi"], default="smollm2")
    p.add_argument("--phase", choices=PHASES, required=True)
    p.add_argument("--batch", type=int, default=8, help="sequences a step")
    p.add_argument("--seq", type=int, help="tokens a sequence (default: the model's)")
    p.add_argument("--steps", type=int, default=5, help="timed steps")
    p.add_argument("--warmup", type=int, default=3, help="steps before them")
    p.add_argument("--warm", action="store_true", help="only fill the compilation caches")
    p.add_argument("--compile", action="store_true", help="torch.compile")
    p.add_argument("--region", choices=["layer", "model"], default="layer", help="what is compiled as one graph")
    p.add_argument("--mode", help="torch.compile's mode, such as max-autotune-no-cudagraphs")
    p.add_argument("--graph", action="store_true", help="capture the whole step as one CUDA graph")
    p.add_argument("--attention", choices=["rebuild", "stream", "held"], default="rebuild",
                   help="orient: matrices from Q and K beside SDPA; made once a layer; or all held (output_attentions)")
    p.add_argument("--head", choices=["plain", "chunked"], default="plain", help="distill: the cross-entropy")
    p.add_argument("--head-rows", type=int, default=4096, help="tokens a piece of the chunked head")
    p.add_argument("--conv", choices=["auto", "shifted", "library"], default="auto")
    p.add_argument("--chunk", type=int, help="tokens a chunk of the scan")
    p.add_argument("--checkpoint", action="store_true", help="distill: recompute each layer in the backward pass")
    p.add_argument("--sdpa", choices=["default", "flash", "cudnn"], default="default")
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--tiny", action="store_true", help="small dimensions, f32, to try the script out")
    p.add_argument("--losses", action="store_true", help="print every step's loss to stderr")
    return p.parse_args()


ARGS = arguments()


def caches():
    """Calls on one machine share what they compile."""
    root = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", "/tmp/pipe-peer-cache")
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(root, "triton"))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if ARGS.warm:  # other processes may be running: keep the kernels, not what was timed
        os.environ.setdefault("TORCHINDUCTOR_AUTOTUNE_LOCAL_CACHE", "0")
    else:
        os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")


caches()
sys.dont_write_bytecode = True

import torch  # noqa: E402  (the caches' variables come first)

import head  # noqa: E402
import model as m  # noqa: E402
import scan as scans  # noqa: E402


class Setup:
    """What all phases use: dimensions, tables, the compiler and the optimiser."""

    def __init__(self, args):
        dims = (m.TINY if args.tiny else m.MODELS)[args.model]
        if args.seq:
            dims = replace(dims, seq=args.seq)
        if args.chunk:
            dims = replace(dims, chunk=args.chunk)
        self.args, self.dims = args, dims
        self.dtype = torch.float32 if args.tiny else torch.bfloat16
        self.low = {"device": args.device, "dtype": self.dtype}
        self.master = {"device": args.device, "dtype": torch.float32}
        shifted = args.compile if args.conv == "auto" else args.conv == "shifted"
        self.how = SimpleNamespace(shifted=shifted, opaque=args.compile, rebuild=args.attention == "rebuild")
        self.rotary = m.rotary_tables(dims, dims.seq, self.low)
        self.ids = torch.randint(0, dims.vocab, (args.batch, dims.seq), device=args.device)

    def compiled(self, function):
        """One graph, reused by every layer: its weights are inputs."""
        if not self.args.compile:
            return function
        return torch.compile(function, fullgraph=True, dynamic=False, mode=self.args.mode)

    def above(self):
        seq = self.dims.seq
        return torch.ones(seq, seq, dtype=torch.bool, device=self.args.device).triu(1)

    def teacher(self):
        layers = [
            m.block_weights(self.dims, self.low) | m.attention_weights(self.dims, self.low)
            for _ in range(self.dims.layers)
        ]
        return layers, m.end_weights(self.dims, self.low)

    def trained(self, tables):
        for t in tables:
            for p in t.values():
                p.requires_grad_()
        return tables

    def adamw(self, params):
        decay, plain = [p for p in params if p.dim() > 1], [p for p in params if p.dim() == 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            groups, lr=self.args.lr, betas=(0.9, 0.95), fused=True, capturable=self.args.graph
        )


def per_layer_clip(tables, limit=1.0):
    """clip_grad_norm_ of every layer in few launches: all norms in one foreach call."""
    params = [[p for p in t.values() if p.grad is not None] for t in tables]
    grads = [[p.grad for p in layer] for layer in params]
    norms = torch.stack(torch._foreach_norm([g for layer in grads for g in layer])).view(len(grads), -1)
    scales = (limit / (norms.norm(dim=1) + 1e-6)).clamp(max=1.0)
    for layer, scale in zip(grads, scales.unbind()):
        torch._foreach_mul_(layer, scale)


# --- the phases: each returns a step that returns its losses -------------------------------------------------------


def forward_phase(setup, logits):
    dims = setup.dims
    layers, ends = setup.teacher()

    def run(ids, layers, ends, layer):
        h = torch.nn.functional.embedding(ids, ends["embed"])
        for table in layers:
            h = layer(dims, h, table, setup.rotary)
        h = m.norm(dims, h, ends, "norm")
        return head_of(dims, h, ends) if logits else h

    if setup.args.region == "model":
        whole = setup.compiled(partial(run, layer=m.teacher_layer))
        call = partial(whole, setup.ids, layers, ends)
    else:
        call = partial(run, setup.ids, layers, ends, setup.compiled(m.teacher_layer))

    def step():
        with torch.no_grad():
            call()
        return []

    return step


def head_of(dims, h, ends):
    return m.linear(h, ends, "head") if dims.parallel else torch.nn.functional.linear(h, ends["embed"].to(h.dtype))


def layerwise_phase(setup, losses_of):
    """A step of orient or align: `losses_of(h, mixers)` yields every layer's loss, freed before the next one's."""
    layers, ends = setup.teacher()
    mixers = setup.trained([m.mixer_weights(setup.dims, setup.master) for _ in layers])
    optimiser = setup.adamw([p for t in mixers for p in t.values()])

    def step():
        with torch.no_grad():
            h = torch.nn.functional.embedding(setup.ids, ends["embed"])
        losses = []
        for loss in losses_of(h, layers, mixers):
            loss.backward()
            losses.append(loss.detach())
        per_layer_clip(mixers)
        optimiser.step()
        optimiser.zero_grad()
        return losses

    return step


def orient_phase(setup):
    dims, how, above = setup.dims, setup.how, setup.above()
    if setup.args.attention == "held":
        forward = setup.compiled(m.teacher_layer_with_matrix)
        loss_of = setup.compiled(m.orient_from_matrix)

        def losses(h, layers, mixers):
            inputs, matrices = [], []
            with torch.no_grad():
                for table in layers:
                    inputs.append(h)
                    h, a = forward(dims, h, table, setup.rotary, above)
                    matrices.append(a)
            for u, a, table, mixer in zip(inputs, matrices, layers, mixers):
                yield loss_of(dims, u, table, mixer, a, above, how)

        return layerwise_phase(setup, losses)
    layer = setup.compiled(m.orient_layer)

    def losses(h, layers, mixers):
        for table, mixer in zip(layers, mixers):
            loss, h = layer(dims, h, table, mixer, setup.rotary, above, how)
            yield loss

    return layerwise_phase(setup, losses)


def align_phase(setup):
    layer = setup.compiled(m.align_layer)

    def losses(h, layers, mixers):
        for table, mixer in zip(layers, mixers):
            loss, h = layer(setup.dims, h, table, mixer, setup.rotary, setup.how)
            yield loss

    return layerwise_phase(setup, losses)


def distill_phase(setup):
    dims, args = setup.dims, setup.args
    layers, ends = setup.teacher()
    students = setup.trained(
        [m.block_weights(dims, setup.master) | m.mixer_weights(dims, setup.master) for _ in layers]
    )
    (own,) = setup.trained([m.end_weights(dims, setup.master)])
    params = [p for t in [*students, own] for p in t.values()]
    optimiser = setup.adamw(params)
    whole = args.region == "model"
    teacher_layer = m.teacher_layer if whole else setup.compiled(m.teacher_layer)
    student_layer = m.student_layer if whole else setup.compiled(m.student_layer)
    teacher_norm, student_norm = (partial(setup.compiled(m.norm), dims) for _ in range(2))
    plain = setup.compiled(head.distance) if args.compile else head.eager_distance
    piece = setup.compiled(head.piece)
    accumulate = head.accumulator(args.device, setup.dtype)
    n = args.batch * dims.seq
    rows = args.head_rows if n % args.head_rows == 0 else n

    def teach(h):
        for table in layers:
            h = teacher_layer(dims, h, table, setup.rotary)
        return h

    def learn(h):
        for table in students:
            if args.checkpoint:
                h = torch.utils.checkpoint.checkpoint(student_layer, dims, h, table, setup.how, use_reentrant=False)
            else:
                h = student_layer(dims, h, table, setup.how)
        return h

    if whole:
        teach, learn = setup.compiled(teach), setup.compiled(learn)

    def step():
        embed = torch.nn.functional.embedding
        with torch.no_grad():
            theirs = teacher_norm(teach(embed(setup.ids, ends["embed"])), ends, "norm").flatten(0, 1)
        ours = student_norm(learn(embed(setup.ids, own["embed"]).to(setup.dtype)), own, "norm").flatten(0, 1)
        name = "head" if dims.parallel else "embed"
        if args.head == "chunked":
            teacher = (theirs, ends[name], ends.get("head_bias"))
            loss = head.Chunked.apply(ours, own[name], own.get("head_bias"), teacher, rows, piece, accumulate)
        else:
            with torch.no_grad():
                target = head_of(dims, theirs, ends)
            loss = plain(head_of(dims, ours, own), target)
            del target
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimiser.step()
        optimiser.zero_grad()
        return [loss.detach()]

    return step


def phase(setup):
    name = setup.args.phase
    if name.startswith("teacher"):
        return forward_phase(setup, name == "teacher-logits")
    return {"orient": orient_phase, "align": align_phase, "distill": distill_phase}[name](setup)


# --- timing and memory ---------------------------------------------------------------------------------------------


class Clock:
    """Times between steps, without waiting for the device inside."""

    def __init__(self, cuda):
        self.cuda, self.marks = cuda, []

    def mark(self):
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self):
        pairs = list(zip(self.marks, self.marks[1:]))
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairs]
        return [(b - a) * 1e3 for a, b in pairs]


class Memory:
    """The rise of the device's used memory, in GiB. The context itself is not counted."""

    def __init__(self, cuda):
        self.cuda = cuda
        if cuda:
            torch.cuda.init()
            torch.cuda.synchronize()
            self.free = torch.cuda.mem_get_info()[0]

    def settle(self):
        """Forgets what compiling and warming up took."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def report(self):
        if not self.cuda:
            return {"peak_gib": None}
        gib = lambda n: round(n / 2**30, 2)  # noqa: E731
        rise = self.free - torch.cuda.mem_get_info()[0]
        reserved = torch.cuda.max_memory_reserved()
        return {
            "peak_gib": gib(max(rise, reserved)),
            "reserved_gib": gib(reserved),
            "allocated_gib": gib(torch.cuda.max_memory_allocated()),
        }


def captured(step):
    """The step as one CUDA graph. It has run before, so kernels are compiled and tuned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = step()

    def replay():
        graph.replay()
        return losses

    return replay


def mean(losses):
    return round(torch.stack(losses).mean().item(), 5) if losses else None


def measure(args, setup, memory):
    step = phase(setup)
    start = time.perf_counter()
    first = mean(step())
    for _ in range(args.warmup - 1 if not args.warm else 1):
        losses = step()
        if args.losses:
            print(mean(losses), file=sys.stderr)
    if args.device == "cuda":
        torch.cuda.synchronize()
    ready = {"warm_s": round(time.perf_counter() - start, 1)}
    if args.warm:
        return ready
    if args.graph:
        step = captured(step)
    memory.settle()
    step()
    if args.device == "cuda":
        torch.cuda.synchronize()
    clock = Clock(args.device == "cuda")
    clock.mark()
    for _ in range(args.steps):
        losses = step()
        clock.mark()
        if args.losses:
            print(mean(losses), file=sys.stderr)
    times = clock.milliseconds()
    ms = statistics.median(times)
    return {
        "ms": round(ms, 3),
        "tok_s": round(args.batch * setup.dims.seq / ms * 1e3),
        **memory.report(),
        "spread": round((max(times) - min(times)) / ms, 3),
        "first_loss": first,
        "last_loss": mean(losses),
        **ready,
    }


def check(args):
    """Compares the pieces with plain f32 arithmetic; prints relative errors."""
    like = {"device": args.device, "dtype": torch.float32 if args.device == "cpu" else torch.bfloat16}
    torch.manual_seed(1)
    x, b, c = (torch.randn(2, 384, 3, 64, **like) / 4 for _ in range(3))
    dt = torch.nn.functional.softplus(torch.randn(2, 384, 3, device=args.device) - 3)
    weight = torch.randn(2, 384, 3, 64, **like)
    gap = lambda a, e: ((a.float() - e.float()).norm() / e.float().norm()).item()  # noqa: E731

    def run(f, inputs):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        y = f(*leaves)
        return [y, *torch.autograd.grad((y.float() * weight.float()).sum(), leaves)]

    exact = run(scans.reference, [t.float() for t in (x, dt, b, c)])
    results = {}
    for name, opaque in (("scan", False), ("scan_opaque", True)):
        def f(x, dt, b, c, opaque=opaque):
            return scans.scan((x.float() * dt[..., None]).to(x.dtype), dt, b, c, 128, opaque)

        results[name] = [round(gap(a, e), 6) for a, e in zip(run(f, [x, dt, b, c]), exact)]
    hidden, teacher = (torch.randn(64, 32, **like) for _ in range(2))
    w, tw = torch.randn(128, 32, device=args.device), torch.randn(128, 32, **like)
    leaves = [hidden.float().requires_grad_(), w.requires_grad_()]
    loss = head.distance(leaves[0] @ w.t(), teacher.float() @ tw.float().t())
    exact = [loss, *torch.autograd.grad(loss, leaves)]
    leaves = [hidden.detach().requires_grad_(), w]
    accumulate = head.accumulator(args.device, like["dtype"])
    loss = head.Chunked.apply(leaves[0], w, None, (teacher, tw, None), 16, head.piece, accumulate)
    got = [loss, *torch.autograd.grad(loss, leaves)]
    results["chunked_head"] = [round(gap(a, e), 6) for a, e in zip(got, exact)]
    results["accumulate"] = accumulate.__name__
    return results


def graphs():
    """Graphs that were compiled: more than a handful means that layers were compiled one by one."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def main():
    args = ARGS
    cuda = args.device == "cuda"
    if cuda and scans.mamba_chunk_scan_combined is None and args.phase in ("align", "distill", "check"):
        sys.exit("mamba_ssm's Triton kernels are not on PYTHONPATH: see benches/compare-pytorch/README.md")
    torch.manual_seed(0)
    if args.sdpa != "default":
        torch.backends.cuda.enable_flash_sdp(args.sdpa == "flash")
        torch.backends.cuda.enable_cudnn_sdp(args.sdpa == "cudnn")
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    memory = Memory(cuda)
    seq = args.seq or (m.TINY if args.tiny else m.MODELS)[args.model].seq
    row = {"model": args.model, "phase": args.phase, "batch": args.batch, "seq": seq, "compile": args.compile}
    options = ("region", "mode", "graph", "attention", "head", "conv", "checkpoint", "sdpa", "warm")
    default = {"region": "layer", "attention": "rebuild", "conv": "auto", "sdpa": "default"}
    if args.phase != "distill":
        default["head"] = args.head
    row |= {k: v for k in options if (v := getattr(args, k)) and v != default.get(k)}
    try:
        row |= check(args) if args.phase == "check" else measure(args, Setup(args), memory)
    except torch.OutOfMemoryError as error:
        row |= {"oom": True, "error": str(error).split(". ")[0]}
    row |= {"torch": torch.__version__, "device": torch.cuda.get_device_name() if cuda else "cpu"}
    if args.compile:
        row["graphs"] = graphs()
    print(json.dumps(row), flush=True)


main()
