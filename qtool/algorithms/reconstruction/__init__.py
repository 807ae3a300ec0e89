"""Block-wise reconstruction: learn the rounding of whole blocks by what leaves them.

Reference:
    Li et al. 2021, arXiv:2102.05426 (BRECQ); Wei et al. 2022, arXiv:2203.05740 (QDrop).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from qtool.algorithms.progress import Meter, ShowProgress
from qtool.algorithms.reconstruction.blocks import Block, find_blocks
from qtool.algorithms.reconstruction.images import BlockImages
from qtool.algorithms.reconstruction.learn import Learned, ReconstructionSettings, learn_block
from qtool.algorithms.reconstruction.simulate import SimulatedBlock, cannot_simulate
from qtool.algorithms.records import CorrectionReport, LayerChange, relative_change
from qtool.algorithms.store import LayerStore
from qtool.graph.fold import Folded
from qtool.quantizers.limits import activated
from qtool.quantizers.lockstep import Lockstep, integer_layers
from qtool.quantizers.plan import LayerPlan, ModelPlan
from qtool.quantizers.weights import weight_values

__all__ = ["NAME", "ReconstructionSettings", "reconstruct"]

NAME = "reconstruction"
# How far apart the seeds of two networks' first blocks are; more than any network has blocks.
SEEDS_APART = 100_003
NUMBERS = "numbers"


def reconstruct(
    reference: fx.GraphModule,
    folded: Folded,
    plan: ModelPlan,
    batches: Sequence[Tensor],
    *,
    layers: Collection[str],
    settings: ReconstructionSettings,
    progress: ShowProgress | None = None,
    store: LayerStore | None = None,
) -> tuple[Folded, ModelPlan, CorrectionReport]:
    """Learn block after block: integers of weights, biases, and the scales of outputs.

    Starts from the integers that the plan has, such as those of GPTQ. A block for which that gives no
    smaller error on the images that were held out keeps what it had. Costs, for each block, three runs of
    it for each image of each step; in memory the values that cross from block to block, of all images, and
    one step.

    Args:
        reference: the float network, batch norms folded, whose outputs are wanted.
        folded: the one that the plan quantizes.
        plan: static, of folded.
        batches: images, of which the first settings.images are used.
        layers: the names of the layers that may change.
        settings: see there.
        progress: is told at every block, and twenty times within it.
        store: results of an earlier, unfinished run of the same; None for none.

    Returns:
        The network with other biases, the plan with other integers and output scales, and what was
        changed.
    """
    lockstep = Lockstep(reference, folded, plan, first_images(batches, settings.images))
    wanted = [name for name in integer_layers(reference, plan) if name in layers]
    blocks = find_blocks(lockstep.folded.traced.graph, wanted, settings.max_layers, settings.unit)
    meter = Meter([(_name(block), block.work) for block in blocks], progress)
    if blocks:
        meter.start()
    changed: list[LayerChange] = []
    left: dict[str, str] = {}
    for number, block in enumerate(blocks):
        key = f"{NAME}.{_name(block)}"
        entry = None if store is None else store.get(key)
        if entry is not None:
            meter.skip()
        else:
            found = _found(lockstep, block, settings, settings.seed * SEEDS_APART + number, meter)
            if isinstance(found, str):
                left |= dict.fromkeys(block.layers, found)
                meter.done()
                continue
            entry = found
            if store is not None:
                store.put(key, entry)
            meter.done()
        changed += _applied(lockstep, block, entry)
    return lockstep.folded, lockstep.plan, CorrectionReport(NAME, tuple(changed), left)


def first_images(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    """The batches cut so that they hold at most so many images."""
    found = []
    for batch in batches:
        if count > 0:
            found.append(batch[:count])
        count -= len(batch)
    return found


def _name(block: Block) -> str:
    """What a block is called: its first and its last layer."""
    return block.layers[0] if len(block.layers) == 1 else f"{block.layers[0]} to {block.layers[-1]}"


def _found(
    lockstep: Lockstep, block: Block, settings: ReconstructionSettings, seed: int, meter: Meter
) -> dict[str, Tensor] | str:
    """What is kept of a block: integers, biases, scales, numbers for the report; or why it is left alone."""
    plans = lockstep.plan.layers
    why = cannot_simulate(block, plans)
    if why:
        return why
    floats = lockstep.float_values(block.entry)
    read, grid = lockstep.quant_values(block.entry)
    targets = lockstep.float_values(block.exit)
    sizes = [len(batch) for batch in lockstep.batches]
    if any([len(x) for x in values] != sizes for values in (read, floats, targets)):
        return "what its block reads or gives is not image by image"
    leaving = plans.get(block.exit.meta.get("layer", ""))
    if leaving is not None:
        targets = [activated(y, leaving.activation, leaving.activation_limit) for y in targets]
    simulated = SimulatedBlock(
        lockstep.folded.traced, block, plans, learn_scales=settings.scale_learning_rate > 0
    )
    images = BlockImages(read, grid, floats, targets)
    return _entry(simulated, learn_block(simulated, images, settings, seed, meter.within))


def _entry(block: SimulatedBlock, learned: Learned) -> dict[str, Tensor]:
    numbers = [learned.before, learned.after, 100 * learned.undecided, float(learned.kept)]
    entry = {NUMBERS: torch.tensor(numbers, dtype=torch.float64)}
    for name, weight in block.weights.items():
        assert weight.decided is not None
        weight_q, bias = weight.decided
        entry[f"weight_q.{name}"] = weight_q
        if bias is not None:
            entry[f"bias.{name}"] = bias.detach()
    for name, grid in block.outputs.items():
        if float(grid.log_ratio.detach()) != 0:
            entry[f"scale.{name}"] = grid.found().scale
    return entry


def _applied(lockstep: Lockstep, block: Block, entry: Mapping[str, Tensor]) -> list[LayerChange]:
    """Give the layers of a block what was found for them."""
    before = lockstep.plan.layers
    outputs = {}
    for key, scale in entry.items():
        kind, _, name = key.partition(".")
        if kind == "scale":
            output = before[name].output
            assert output is not None
            outputs[name] = replace(output, scale=scale)
    if outputs:
        lockstep.move_outputs(outputs)
    for name in block.layers:
        lockstep.change(name, weight_q=entry[f"weight_q.{name}"], bias=entry.get(f"bias.{name}"))
    return [_change(name, before[name], entry) for name in block.layers]


def _change(name: str, before: LayerPlan, entry: Mapping[str, Tensor]) -> LayerChange:
    assert before.weight is not None and before.weight_q is not None
    weight_q = entry[f"weight_q.{name}"]
    error, after, undecided, kept = entry[NUMBERS].tolist()
    differ = 100 * float((weight_q != before.weight_q).double().mean())
    note = f"loss of its block {error:.3g} -> {after:.3g} of the outputs' power"
    note += f", {differ:.1f} % of the integers are others, {undecided:.2f} % undecided before hardening"
    if not kept:
        note += "; what was learned is no better, and was dropped"
    values = [weight_values(before.weight, integers) for integers in (weight_q, before.weight_q)]
    return LayerChange(name, relative_change(*values), note)
