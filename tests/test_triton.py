"""The Triton kernels: their numbers (interpreter here, GPU where there is one), and that every one compiles for Ampere and Hopper without a GPU."""
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA on Linux")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[1]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}   # bytes that one program can have
f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("device", [
    pytest.param("interpreter", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself is here")),
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))])
def test_numbers(device):
    """The interpreter must be chosen before Triton is imported, and a process has one or the other: so each runs in its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | ({"TRITON_INTERPRET": "1"} if device == "interpreter" else {})
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu/triton_numbers.py"],
                          cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_without_triton_the_error_is_clear_and_the_doors_work():
    program = ("import sys; sys.modules['triton'] = None\nimport torch\nfrom actloc.ops.local_attention import local_attention\nimport actloc.ops.nms\n"
               "print(local_attention(*torch.ones(3, 1, 1, 4, 2), 3).sum().item())\n"
               "for name in ('triton_attention', 'triton_nms'):\n"
               "    try: __import__('actloc.kernels.' + name)\n    except ImportError as error: print(error)\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "8.0" and "local_attention chooses a way" in lines[1] and "ops.nms chooses a way" in lines[2]


# ---- ahead of time --------------------------------------------------------------------------------------------------------------------------

def compiled(kernel, types, constants, architecture, divisible=(), **launch):
    """Compiles a kernel for a GPU that need not be here; prints and returns what it takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*") or n in divisible}
    source = ASTSource(kernel, signature, {(i,): constants[n] for i, n in enumerate(names) if n in constants}, attributes)
    found = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)
    registers, stack = usage(found.asm["cubin"])
    print(f"sm_{architecture} {kernel.__name__:15} {' '.join(f'{k}={v}' for k, v in constants.items())} {launch}: "
          f"{registers} registers, {stack} bytes spilled, {found.metadata.shared:,} bytes shared")
    assert found.metadata.shared <= SHARED_MEMORY[architecture]
    return found


def usage(cubin: bytes):
    """Registers per thread and stack bytes, from the tool that Triton carries."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists(): return "?", "?"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    return re.search(r"REG:(\d+) STACK:(\d+)", text).groups()


def compile_attention(name, dtype, D, reach, biased, dropped, architecture):
    import actloc.kernels.triton_attention as attention

    tile, launch = attention.sizes(D, dtype, reach, backward=name == "tiles_backward")
    pointer = {f32: "*fp32", f16: "*fp16", bf16: "*bf16"}[dtype]
    strides = [f"{x}_{dim}" for x in "qkv" for dim in "bht"]
    types = {n: pointer for n in ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")} | {n: "i32" for n in (*strides, "T", "H", "reach")}
    types |= dict(mask="*i1", bias="*fp32", seed="*i64", lse="*fp32", delta="*fp32", d_bias="*fp32", scale="fp32", dropout="fp32")
    if not biased: types["bias"] = pointer                                          # absent tensors are replaced by q
    if not dropped: types["seed"] = pointer
    kernel = getattr(attention, name)
    constants = dict(D=D, **tile, WIDTH=2 * max(tile["M"], tile.get("N", 0)), BIASED=biased, DROPPED=dropped)
    divisible = [s for s in strides if D % 16 == 0 or not s.endswith("h")]
    return compiled(kernel, types, {k: v for k, v in constants.items() if k in kernel.arg_names}, architecture, divisible, **launch)


NARROW = ["slots_forward", "slots_queries", "slots_keys"]
TILED = ["tiles_forward", "tiles_backward"]
ORDINARY = [(n, f32, 64, 9, False, False) for n in NARROW] + [(n, f32, 24, 9, True, True) for n in NARROW] + \
           [(n, bf16, 128, 9, False, False) for n in TILED] + [(n, f16, 24, 9, True, True) for n in TILED] + [("tiles_forward", bf16, 64, 200, False, False)]
EVERY = [(n, dtype, D, reach, both, both) for names, dtypes in ((NARROW, [f32]), (TILED, [f16, bf16])) for n in names for dtype in dtypes
         for D, reach, both in itertools.product((8, 24, 64, 96, 128), (9, 200) if n == "tiles_forward" else (9,), (False, True))]
ahead = pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot compile")
label = lambda x: str(x).removeprefix("torch.")


@ahead
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name, dtype, D, reach, biased, dropped", ORDINARY, ids=label)
def test_attention_compiles(name, dtype, D, reach, biased, dropped, architecture):
    found = compile_attention(name, dtype, D, reach, biased, dropped, architecture)
    if name in TILED: assert ("wgmma" if architecture == 90 else "mma.sync") in found.asm["ptx"], "the matrix units are not used"
    else: assert "tf32" not in found.asm["ptx"]


@ahead
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name, dtype, D, reach, biased, dropped", EVERY, ids=label)
def test_every_attention_compiles(name, dtype, D, reach, biased, dropped, architecture):
    compile_attention(name, dtype, D, reach, biased, dropped, architecture)


@ahead
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_rest_compiles(architecture):
    import actloc.kernels.triton_attention as attention
    import actloc.kernels.triton_nms as nms

    compiled(attention.write_keep, dict(seed="*i64", keep="*fp32", T="i32", H="i32", reach="i32", dropout="fp32"), dict(M=64, SLOTS=32), architecture)
    types = dict.fromkeys(("starts", "ends", "left", "scores", "kept_scores", "kept_segments"), "*fp32") | dict.fromkeys(("offsets", "picks", "count"), "*i64")
    types |= dict.fromkeys(("G", "max_segments", "parts"), "i32") | dict.fromkeys(("threshold", "sigma", "min_score"), "fp32")
    for method in (0, 1, 2):
        compiled(nms.suppress, types, dict(SMALL=nms.SMALL, CHUNK=nms.CHUNK, METHOD=method), architecture, num_warps=8)
    compiled(nms.vote, types, dict(PICKS=nms.PICKS, CHUNK=128), architecture, num_warps=4)


def test_every_kernel_is_compiled_somewhere_above():
    """A kernel that is added to a module must be added here."""
    source = "".join((ROOT / f"actloc/kernels/{module}.py").read_text() for module in ("triton_attention", "triton_nms"))
    kernels = re.findall(r"@triton\.jit\(do_not_specialize.*\)\ndef (\w+)", source)      # what is launched; the rest is inlined
    assert sorted(kernels) == sorted([*NARROW, *TILED, "write_keep", "suppress", "vote"])
