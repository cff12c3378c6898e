"""Which nodes of a graph ONNX Runtime's CUDA provider runs, and what it copies to and fro.

KERNELS is a table of facts: operators, the versions and types that the provider has a kernel for,
and which of their tensors lie in host memory. Written after docs/OperatorKernels.md of
microsoft/onnxruntime (commit 001d12d2, "Operators implemented by CUDAExecutionProvider") and the
kernels' own registrations (InputMemoryType, OutputMemoryType). It is what every version from the
oldest that jexport takes on has: newer ones add versions (pull requests 27728 and 27755: If and
Identity of opset 21 and 23, ReduceMax and ReduceMin of 20), and a graph that needs none of these
runs on all. Left out: operators that no encoder has (convolution, images, sequences).

`place` follows the rules by which ONNX Runtime partitions a graph:
    kernel_registry.cc (VerifyKernelDef)      a kernel of version 13+ takes 13 alone, not 20; one of
                                              13-18 takes all of these
    fallback_cpu_capability.cc                what computes on shapes goes to the CPU
    transformer_memcpy.cc                     a copy for each tensor that is needed elsewhere
The names of operators are all that runs; fusions that a session makes when it is opened are not
known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

SMALL_INITIALIZER = 100
"""Elements of a constant that a node on the CPU may bring along (fallback_cpu_capability.cc)."""

TYPES = {
    "f": "FLOAT",
    "h": "FLOAT16",
    "b": "BFLOAT16",
    "d": "DOUBLE",
    "i": "INT32",
    "l": "INT64",
    "c": "INT8",
    "C": "UINT8",
    "B": "BOOL",
}
"""One letter a tensor type in the table."""

_ALL = "fhbdilcCB"
_HALVES = ("FLOAT16", "BFLOAT16")

_TABLE = """
Abs                 13                      fhbdil
Add                 14                      fhbdil
And                 7                       B
ArgMax              13                      fhd
ArgMin              13                      fhd
Attention           23 24                   fhb
Cast                13-18 19-20 21-22 23    fhbdilcCB
Ceil                13                      fhd
Clip                13                      fhdlcC      in=1,2
Concat              13                      fhbdilcCB
ConstantOfShape     9                       l           in=0
Cos                 7                       fhd
CumSum              14                      fhdil       in=1
DequantizeLinear    13-18 19-20 21          cC
Div                 14                      fhbdil
Einsum              12                      fhd
Equal               13                      Bfhdil
Erf                 13                      fhbd
Exp                 13                      fhbd
Expand              13                      fhbdilcCB   in=1
Flatten             13                      fhbdilcCB
Floor               13                      fhd
Gather              13                      fhbdilcCB
GatherElements      13                      fhbdilcCB
GatherND            13                      fhbdl
Gelu                20                      fhbd
Gemm                13                      fhbd
GlobalMaxPool       1                       fhd
Greater             13                      fhdil
GreaterOrEqual      16                      fhdil
Identity            14-18 19                fhbdilcCB
If                  13-18 19                B           in=0
IsInf               10-19 20                fhbd
IsNaN               13-19 20                fhbd
LayerNormalization  17                      fhbd
Less                13                      fhdil
LessOrEqual         16                      fhdil
Log                 13                      fhd
LogSoftmax          13                      fhd
Loop                13-18 19                l           in=0,1
MatMul              13                      fhbd
MatMulInteger       10                      c
Max                 13                      fhbdil
Min                 13                      fhbdil
Mod                 13                      fhbdil
Mul                 14                      fhbdil
Neg                 13                      fhbdilc
NonZero             13                      BfhilC
Not                 1                       B
OneHot              11                      il          in=1
Or                  7                       B
Pad                 13-17 18                Bfhd        in=1,2
Pow                 15                      fhbdil
QuantizeLinear      13-18 19-20 21          fh
RMSNormalization    23                      fhbd
Range               11                      fdil        in=0,1,2
Reciprocal          13                      fhd
ReduceL1            18                      fhdi        in=1
ReduceL2            18                      fhdi        in=1
ReduceLogSumExp     18                      fhd         in=1
ReduceMax           18                      fhdil       in=1
ReduceMean          18                      fhdi        in=1
ReduceMin           18                      fhdilcC     in=1
ReduceProd          18                      fhdi        in=1
ReduceSum           13                      fhbdil      in=1
ReduceSumSquare     18                      fhd         in=1
Relu                14                      fhbd
Reshape             14-18 19-20 21-22 23    fhbdilcCB   in=1
RotaryEmbedding     23                      fhb
Round               11                      fhd
ScatterElements     16-17 18                fhbdilcCB
ScatterND           16-17 18                fhbdilcCB
Shape               15-18 19-20 21-22 23    fhbdilcCB   out=0
Sigmoid             13                      fhbd
Sign                13                      fhbdilcC
Sin                 7                       fhd
Size                13                      fhbdilcCB   out=0
Slice               13                      fhbdilcCB   in=1,2,3,4
Softmax             13                      fhbd
Split               13-17 18                fhbdilcCB   in=1
Sqrt                13                      fhbd
Squeeze             13-20 21-22 23          fhbdilcCB   in=1
Sub                 14                      fhbdil
Sum                 13                      fhbd
Tanh                13                      fhbd
Tile                13                      fhbdil      in=1
TopK                11                      fhdil       in=1
Transpose           13-20 21-22 23          fhbdilcCB
Trilu               14                      fhbdilcCB   in=1
Unsqueeze           13-20 21-22 23          fhbdilcCB   in=1
Where               16                      B
Xor                 7                       B
com.microsoft.Attention                     1  fhb
com.microsoft.BiasAdd                       1  fh
com.microsoft.BiasGelu                      1  fhbd
com.microsoft.BiasSoftmax                   1  fhd
com.microsoft.BiasSplitGelu                 1  fh
com.microsoft.DequantizeLinear              1  cC
com.microsoft.EmbedLayerNormalization       1  i
com.microsoft.FastGelu                      1  fhbd
com.microsoft.FusedMatMul                   1  fhbd
com.microsoft.GatherBlockQuantized          1  C
com.microsoft.Gelu                          1  fhbd
com.microsoft.GroupQueryAttention           1  hb           in=6
com.microsoft.MatMulNBits                   1  fhb
com.microsoft.MultiHeadAttention            1  fhb          in=8
com.microsoft.PackedAttention               1  fh
com.microsoft.PackedMultiHeadAttention      1  fh
com.microsoft.QAttention                    1  c
com.microsoft.QuantizeLinear                1  h
com.microsoft.QuickGelu                     1  fhbd
com.microsoft.RelativePositionBias          1  fh           in=1,2
com.microsoft.RemovePadding                 1  fh           out=3
com.microsoft.RestorePadding                1  fh
com.microsoft.RotaryEmbedding               1  fhb
com.microsoft.SkipLayerNormalization        1  fhb
com.microsoft.SkipSimplifiedLayerNormalization  1  fhb
com.microsoft.TransposeMatMul               1  fhbd
com.microsoft.Trilu                         1  fhbdilcCB    in=1
"""
"""Operator, versions (`13-18`: a kernel for all of these; `19`: for 19 alone), types of the first
input, and the inputs and outputs that lie in host memory."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """The CUDA kernels of one operator.

    Args:
        versions: first and last operator version that a kernel takes.
        types: those of the first input.
        host_inputs: positions of tensors in host memory (shapes, axes, a condition).
        host_outputs: the same of its outputs.
    """

    versions: tuple[tuple[int, int], ...]
    types: frozenset[str]
    host_inputs: frozenset[int]
    host_outputs: frozenset[int]


def _positions(words: list[str], key: str) -> frozenset[int]:
    listed = [word.removeprefix(f"{key}=") for word in words if word.startswith(f"{key}=")]
    return frozenset(int(number) for one in listed for number in one.split(","))


def _read(table: str) -> dict[str, Kernel]:
    kernels = {}
    for line in table.strip().splitlines():
        operator, *words = line.split()
        spans = [word.split("-") for word in words if word[0].isdigit()]
        letters = next(word for word in words if set(word) <= set(_ALL))
        kernels[operator] = Kernel(
            versions=tuple((int(span[0]), int(span[-1])) for span in spans),
            types=frozenset(TYPES[letter] for letter in letters),
            host_inputs=_positions(words, "in"),
            host_outputs=_positions(words, "out"),
        )
    return kernels


KERNELS = _read(_TABLE)
"""By operator: `Add`, or with its domain `com.microsoft.Attention`."""


def operator_name(node: ir.Node) -> str:
    """As KERNELS and the manifest's operator counts name it.

    Args:
        node: of any domain.

    Returns:
        The operator, after its domain where that is not ONNX's own.
    """
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def without_kernel(operators: Iterator[str] | list[str]) -> list[str]:
    """Those operators that have no CUDA kernel in any version or type.

    Args:
        operators: named as in KERNELS.

    Returns:
        Their names, sorted, each once.
    """
    return sorted({name for name in operators if name not in KERNELS})


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the nodes of a graph run on a machine with a GPU, each as 'operator (node name)'.

    Args:
        cpu: on the CPU although they compute on tensors, because there is no kernel for them.
        shapes: on the CPU because they compute on shapes alone; they cost nothing there.
        copies: names of tensors that a Memcpy node brings to the other side, once a run.
        control_flow: nodes that hold graphs of their own; no CUDA graph can be captured with them.
    """

    cpu: tuple[str, ...]
    shapes: tuple[str, ...]
    copies: tuple[str, ...]
    control_flow: tuple[str, ...]

    @property
    def capturable(self) -> bool:
        """Whether ONNX Runtime can capture it as a CUDA graph."""
        return not (self.cpu or self.copies or self.control_flow)


def place(model: ir.Model) -> Placement:
    """Where ONNX Runtime would run each node with the providers CUDA and CPU.

    Args:
        model: with types of its values (a value without one is taken to be of a type that has a
            kernel). Functions are not looked into.

    Returns:
        The placement of every node, also of those in branches and bodies.
    """
    nodes = list(model.graph.all_nodes())
    imports = {domain: int(version) for domain, version in model.opset_imports.items()}
    kernels = {node: _kernel(node, imports) for node in nodes}
    shapes = _on_shapes(nodes, kernels)
    cpu = {node for node in nodes if kernels[node] is None}
    host = cpu | shapes
    return Placement(
        cpu=tuple(_label(node) for node in nodes if node in cpu),
        shapes=tuple(_label(node) for node in nodes if node in shapes),
        copies=tuple(_copies(nodes, kernels, host)),
        control_flow=tuple(_label(node) for node in nodes if _holds_graph(node)),
    )


def _label(node: ir.Node) -> str:
    return f"{operator_name(node)} ({node.name})"


def _holds_graph(node: ir.Node) -> bool:
    return any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in node.attributes.values())


@cache
def since_version(operator: str, domain: str, opset: int) -> int:
    """The version of an operator that an opset has.

    Args:
        operator: its name.
        domain: '' for ONNX's own.
        opset: of that domain.

    Returns:
        The version, 1 for an operator that ONNX does not define.
    """
    import onnx

    try:
        schema = onnx.defs.get_schema(operator, opset, domain)
    except onnx.defs.SchemaError:
        return 1
    return int(schema.since_version)


def _kernel(node: ir.Node, imports: dict[str, int]) -> Kernel | None:
    """The kernel that takes a node, or None."""
    kernel = KERNELS.get(operator_name(node))
    if kernel is None:
        return None
    version = since_version(node.op_type, node.domain, imports.get(node.domain, 1))
    if not any(first <= version <= last for first, last in kernel.versions):
        return None
    first_input = next(iter(node.inputs), None)
    dtype = first_input.dtype if first_input is not None else None
    return kernel if dtype is None or dtype.name in kernel.types else None


def _on_shapes(nodes: list[ir.Node], kernels: dict[ir.Node, Kernel | None]) -> set[ir.Node]:
    """Nodes with a kernel that go to the CPU, because all they read lies in host memory there."""
    on_host: set[ir.Value] = set()
    placed: set[ir.Node] = set()
    for node in nodes:  # in topological order
        kernel = kernels[node]
        if kernel is None:  # seen only where it follows a shape
            if any(value in on_host for value in node.inputs):
                on_host.update(node.outputs)
        elif _reads_host_alone(node, kernel, on_host):
            placed.add(node)
            on_host.update(node.outputs)
        else:
            on_host.update(
                node.outputs[place] for place in kernel.host_outputs if place < len(node.outputs)
            )
    return placed


def _reads_host_alone(node: ir.Node, kernel: Kernel, on_host: set[ir.Value]) -> bool:
    """Whether a node is moved to the CPU: something it reads is there, and nothing on the GPU."""
    reads = [(place, value) for place, value in enumerate(node.inputs) if value is not None]
    if not any(value in on_host for _, value in reads):
        return False
    for place, value in reads:
        if value.dtype is not None and value.dtype.name in _HALVES:
            return False
        if value.is_graph_input() or _is_small(value):
            continue
        if value not in on_host or place in kernel.host_inputs:
            return False
    return True


def _is_small(value: ir.Value) -> bool:
    tensor = value.const_value
    return value.is_initializer() and tensor is not None and tensor.size <= SMALL_INITIALIZER


def _copies(
    nodes: list[ir.Node], kernels: dict[ir.Node, Kernel | None], host: set[ir.Node]
) -> Iterator[str]:
    """Names of values that are made in one memory and read from the other.

    Graph inputs that both sides read are among them; constants are not: they are kept twice.
    """
    for value in _values(nodes):
        if value.is_initializer() or value.const_value is not None:
            continue
        sides = {_reads_on_host(user, place, kernels, host) for user, place in value.uses()}
        producer = value.producer()
        if producer is not None:
            kernel = kernels[producer]
            outside = kernel is None or value.index() in kernel.host_outputs
            sides.add(producer in host or outside)
        if len(sides) > 1:
            yield str(value.name)


def _values(nodes: list[ir.Node]) -> list[ir.Value]:
    """Every value that nodes read or make, once, in order."""
    seen: dict[ir.Value, None] = {}
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                seen.setdefault(value)
    return list(seen)


def _reads_on_host(
    user: ir.Node, place: int, kernels: dict[ir.Node, Kernel | None], host: set[ir.Node]
) -> bool:
    kernel = kernels[user]
    return user in host or kernel is None or place in kernel.host_inputs
