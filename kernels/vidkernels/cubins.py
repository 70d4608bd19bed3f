"""What a compiled kernel uses: every recorded launch becomes a cubin without a GPU, and its resources are read."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vidkernels.cuda_source import ROOT, compile_source
from vidkernels.launch import Gpu, Launch, TensorMap, descriptor, triton_function


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes and holds."""

    registers: int
    """For each thread."""
    stack_bytes: int
    local_accesses: int
    """Loads and stores of local memory: spilled registers, or arrays indexed at run time."""
    shared_bytes: int
    """For each block, static and dynamic."""
    narrow_accesses: int
    """Loads and stores of global memory that move less than 4 bytes a thread: what failed to be vectorised."""
    matrix_instructions: str
    """The widest kind there is: `wgmma`, `tcgen05`, `mma`, or none."""
    instructions: int


def specialisation(launch: Launch, gpu: Gpu) -> tuple[Any, ...]:
    """What Triton compiles for a launch: (function, signature, constexprs, attributes, options).

    It is found by Triton's own binder, so that what is compiled here is what a launch on a GPU compiles.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    function = triton_function(launch.kernel)
    backend = make_backend(GPUTarget("cuda", gpu.capability, 32))
    keywords = {**launch.constants, **launch.options}
    args = [descriptor(arg) if isinstance(arg, TensorMap) else arg for arg in launch.args]
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialised, _ = binder(*args, **keywords)
    options, signature, constants, attributes = function._pack_args(backend, keywords, bound, specialised, None)
    return function, signature, constants, attributes, options


def key(launch: Launch, gpu: Gpu) -> str:
    """Text that two launches share exactly where one compilation serves both."""
    if launch.language == "cuda":
        macros = " ".join(f"{name}={value}" for name, value in sorted(launch.constants.items()))
        return f"{launch.kernel} {macros} block={launch.options['block']}"
    _, signature, constants, attributes, options = specialisation(launch, gpu)
    names = list(signature)
    values = {names[path[0]]: value for path, value in constants.items()}
    aligned = {names[path[0]] for path, attribute in attributes.items() if attribute}
    # A plain 32-bit integer is what a size is unless something is known of it.
    types = " ".join(
        f"{name}:{kind}{'/16' if name in aligned else ''}"
        for name, kind in signature.items()
        if name not in values and (kind != "i32" or name in aligned)
    )
    text = " ".join(f"{name}={value}" for name, value in values.items())
    limits = f"num_warps={options.num_warps} num_stages={options.num_stages} maxnreg={options.maxnreg}"
    return f"{launch.kernel} ({types}) {text} {limits}"


def source(launch: Launch) -> str:
    """A hash of the kernel's source, and of all that it calls."""
    if launch.language == "triton":
        text: str = triton_function(launch.kernel).cache_key
        return text
    return hashlib.sha256((ROOT / launch.kernel.partition(":")[0]).read_bytes()).hexdigest()


def build(launch: Launch, gpu: Gpu) -> tuple[bytes, int]:
    """The cubin of a launch for a GPU, and the shared memory of its blocks.

    Raises:
        RuntimeError: It does not compile.
    """
    if launch.language == "cuda":
        return compile_source(launch.kernel, launch.constants, gpu.capability), launch.options["shared_bytes"]
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, signature, constants, attributes, options = specialisation(launch, gpu)
    source = ASTSource(function, signature, constants, attributes)
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", gpu.capability, 32), options=options.__dict__)
    except Exception as error:
        raise RuntimeError(f"{key(launch, gpu)} does not compile for {gpu.name}:\n{error}") from error
    return kernel.asm["cubin"], kernel.metadata.shared


def resources(cubin: bytes, shared_bytes: int, gpu: Gpu) -> Resources:
    """What a cubin uses, with the dynamic shared memory given; read by the cuobjdump that lies in Triton's package."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = _cuobjdump("--dump-resource-usage", "--dump-sass", str(path))
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    return Resources(
        registers=found["REG"],
        stack_bytes=found["STACK"],
        local_accesses=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        # cuobjdump knows the static part and, from sm_90 on, adds the kilobyte that the system keeps.
        shared_bytes=max(found["SHARED"] - (1024 if gpu.capability >= 90 else 0), 0) + shared_bytes,
        narrow_accesses=sum(_NARROW.match(opcode) is not None for opcode in opcodes),
        matrix_instructions=_matrix_instructions(opcodes),
        instructions=len(opcodes),
    )


_NARROW = re.compile(r"(LDG|STG|LDGSTS)\.E\.(U8|S8|U16|S16)\b")


def _matrix_instructions(opcodes: list[str]) -> str:
    for prefix, name in (("UTC", "tcgen05"), ("HGMMA", "wgmma"), ("IGMMA", "wgmma"), ("HMMA", "mma")):
        if any(opcode.startswith(prefix) and "MMA" in opcode for opcode in opcodes):
            return name
    return "none"


def _cuobjdump(*arguments: str) -> str:
    done = subprocess.run([_program(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump: {done.stderr.strip()}")
    return done.stdout


@cache
def _program() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
