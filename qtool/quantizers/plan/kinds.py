"""What can be done with a layer, decided from its operation and from what is asked of it."""

from __future__ import annotations

from torch import fx

from qtool.graph import ops
from qtool.graph.trace import tensor_inputs
from qtool.graph.unbounded import is_unbounded
from qtool.numerics.spec import LayerSpec, QuantSpec
from qtool.quantizers.plan.records import (
    CAST,
    DECIDES,
    EMBEDDING,
    FAKE,
    FLOAT,
    IDENTITY,
    INTEGER,
    NOT_ASKED,
    WEIGHTS_ONLY,
)

WEIGHTED = frozenset({"conv", "conv_transpose", "linear"})
MASK = "its values can be infinite, as those of a mask"
READS_MASK = "it reads values that can be infinite, as those of a mask"
MATRIX_PRODUCTS = WEIGHTED | {"matmul", "einsum"}
# Operations that compute on the integers of all their inputs.
INTEGER_OPS = frozenset({"add", "mul", "cat", "matmul", "einsum"})


def quantizes_output(node: fx.Node, spec: LayerSpec | None) -> bool:
    """Whether a layer's output is put on a grid that activation ranges decide."""
    return layer_kind(node, spec, fused_away=False)[0] in (INTEGER, FAKE)


def layer_kind(node: fx.Node, spec: LayerSpec | None, fused_away: bool) -> tuple[str, str]:
    """What is done with a layer, by the constants of records.py, and why if it is not what was asked.

    Args:
        node: of the folded network.
        spec: what is asked of it.
        fused_away: whether the layer in front of it computes it.
    """
    op: str = node.meta["op"]
    if fused_away:
        return IDENTITY, ""
    if spec is not None and spec.identity:
        same = len(tensor_inputs(node)) == 1 and _same_shape(tensor_inputs(node)[0], node)
        return (IDENTITY, "") if same else (FLOAT, "cannot be left out: its output has another shape")
    if spec is not None and spec.float_bits is not None:
        return _float_kind(op, spec)
    if spec is None or (spec.output is None and spec.weight is None):
        return FLOAT, NOT_ASKED
    if not ops.is_float_tensor(node.meta["value"]):
        return FLOAT, "gives several tensors"
    if is_unbounded(node):
        return FLOAT, MASK
    if op == "embedding":
        return (FLOAT, NOT_ASKED) if spec.weight is None else (EMBEDDING, "")
    reads_mask = any(is_unbounded(source) for source in tensor_inputs(node))
    if reads_mask and op in WEIGHTED | INTEGER_OPS:
        return FLOAT, READS_MASK
    if op in WEIGHTED and spec.weight is not None:
        return (WEIGHTS_ONLY if spec.output is None else INTEGER), ""
    if spec.output is None:
        return FLOAT, "has no weights"
    if node.meta.get("decides") and op not in MATRIX_PRODUCTS:
        return FLOAT, DECIDES
    on_integers = op in INTEGER_OPS and spec.carried is None and computes_only_tensors(node)
    return (INTEGER if on_integers else FAKE), ""


def _float_kind(op: str, spec: LayerSpec) -> tuple[str, str]:
    """What becomes of a layer that is to run in a float type of its own."""
    on_integers = op in WEIGHTED or op in INTEGER_OPS or op == "embedding"
    on_grid = spec.output is not None and (not on_integers if spec.fake is None else spec.fake)
    return (FAKE if on_grid else CAST), ""


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    shapes = [getattr(n.meta["value"], "shape", None) for n in (a, b)]
    return shapes[0] is not None and shapes[0] == shapes[1]


def beyond_float32(x: QuantSpec, weight: QuantSpec) -> bool:
    """Whether products alone fill float32's 24 bits, so that sums would be rounded for sure."""
    return x.num_bits + weight.num_bits > 16


def computes_only_tensors(node: fx.Node) -> bool:
    """Whether an add, mul, cat or matmul combines two or more float tensors and nothing else."""
    tensors = tensor_inputs(node)
    combined = node.args
    if node.meta["op"] == "cat":
        sequence = node.args[0] if node.args else node.kwargs.get("tensors")
        combined = tuple(sequence) if isinstance(sequence, (list, tuple)) else ()
        if not set(node.kwargs) <= {"tensors", "dim"}:
            return False
    elif node.kwargs:
        return False
    return len(tensors) >= 2 and list(combined) == tensors
