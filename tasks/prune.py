"""Prune: takes whole channels out of the network, so that every runtime is faster without knowing of it."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import nn

from jetway.configs.schema import FinetuneConfig, PruneConfig, Section
from jetway.tasks.allocation import Point, allocate
from jetway.tasks.artifacts import Checkpoint, Report, StageOutput
from jetway.tasks.attention import find_attention
from jetway.tasks.channels import (
    Candidate,
    Cut,
    Limits,
    apply_cuts,
    checked_outputs,
    plan_cuts,
)
from jetway.tasks.checkpoint import (
    build_network,
    load_network,
    load_weights,
    network_tensors,
    save_checkpoint,
)
from jetway.tasks.cut_proof import is_proven
from jetway.tasks.dependencies import trace_dependencies
from jetway.tasks.depth import Round, prune_depth
from jetway.tasks.errors import ConfigError, PruningError
from jetway.tasks.importance import rank_candidates
from jetway.tasks.macs import count_macs, count_params, total_macs
from jetway.tasks.patterns import matching_attention, matching_names, prunable_names
from jetway.tasks.stage import StageContext, run_stage
from jetway.tasks.structure import Structure, describe_structure
from jetway.tasks.training import batchnorm_scales, evaluate, train
from jetway.tasks.workload import Outputs

logger = logging.getLogger("jetway")

_SPARSE_BELOW = 0.01

# Halvings of the ratio when a target is searched: the one found is within 0.001 of the smallest.
_SEARCH_STEPS = 10

# Ratio at which cuts are tried when the one to use is still to be found.
_TRIED_RATIO = 0.5

# Modules that an error names.
_LISTED = 3


class PruneInputs(Section):
    """What the stage's result depends on: fine-tuning counts only where it happens between steps."""

    prune: PruneConfig
    finetune: FinetuneConfig | None


def prune_network(
    context: StageContext,
    baseline: Checkpoint,
    config: PruneConfig,
    finetune_config: FinetuneConfig,
    sensitivity: Report | None = None,
) -> StageOutput:
    """The network with fewer channels, its outputs' shapes unchanged, and what became of each module.

    Layers that make the outputs keep their channels, and so does whatever shares channels with an ignored
    layer. With ``target_macs_ratio`` the smallest ratio that reaches it is searched; with ``pruning_ratio: auto``
    each group gets one of its own, by what ``sensitivity`` measured.

    Raises ConfigError for a pattern that matches nothing, PruningError when the network cannot be traced or
    cut, or the target cannot be reached.
    """
    pruner = _Pruner(context, load_network(context.workload, baseline, context.store), config)
    pruner.name_shared()
    pruner.slim()
    pruner.prune_depth()
    if config.pruning_ratio == "auto":
        pruner.allocate(sensitivity)
    for step in range(1, config.iterative_steps + 1) if pruner.prunes_channels else ():
        context.progress("prune", step - 1, config.iterative_steps, f"step {step}/{config.iterative_steps}")
        pruner.run_step(step)
        if step < config.iterative_steps and config.finetune_epochs_between:
            _finetune_between(context, baseline, pruner.network, config, finetune_config)
    context.progress("prune", config.iterative_steps, config.iterative_steps, "done")
    return _output(context, baseline, pruner)


@task(name="prune", cache_policy=NO_CACHE, persist_result=False)
def prune(
    context: StageContext,
    baseline: Checkpoint,
    config: PruneConfig,
    finetune_config: FinetuneConfig,
    sensitivity: Report | None = None,
) -> StageOutput:
    return run_stage(
        context,
        "prune",
        lambda ctx: prune_network(ctx, baseline, config, finetune_config, sensitivity),
        inputs=[baseline, *([sensitivity] if sensitivity else [])],
        section=prune_inputs(config, finetune_config),
    )


def prune_inputs(config: PruneConfig, finetune_config: FinetuneConfig) -> PruneInputs:
    between = config.iterative_steps > 1 and config.finetune_epochs_between > 0
    return PruneInputs(prune=config, finetune=finetune_config if between else None)


class _Pruner:
    """The network on its way, and what it was at the start."""

    def __init__(self, context: StageContext, network: nn.Module, config: PruneConfig) -> None:
        self.context, self.workload, self.config, self.network = context, context.workload, config, network
        self.inputs = context.workload.example_inputs()
        self.outputs = self._call(network)
        self.before = count_macs(network, self.inputs)
        self.baseline = copy.deepcopy(network)
        self.structure: Structure = describe_structure(context.workload.network(), network)
        self.slimming: dict[str, Any] = {}
        #: Ratios that ``pruning_ratio: auto`` found, by the first member of a group.
        self.allocated: dict[str, float] = {}
        self.rounds: list[Round] = []
        self.initial: dict[str, int] = {}
        self.initial_heads: dict[str, int] = {}
        self.ratios_used: list[float] = []
        #: Shares of the MACs that this step's cuts would leave, by their roots and sizes.
        self.tried: dict[tuple[tuple[str, int], ...], float] = {}
        names = prunable_names(network)
        ignored = matching_names(config.ignored_layers, names, "prune.ignored_layers")
        self.ignored = frozenset(name for found in ignored.values() for name in found)
        own = matching_names(config.pruning_ratios, names, "prune.pruning_ratios")
        self.ratios = self._head_dim_ratios() | {
            name: config.pruning_ratios[pattern] for pattern in own for name in own[pattern]
        }
        heads = matching_attention(config.head_ratios, network, "prune.head_ratios")
        every = [attention.name for attention in find_attention(network)]
        self.head_ratios = dict.fromkeys(every, config.head_ratio) | {
            name: config.head_ratios[pattern] for pattern in heads for name in heads[pattern]
        }

    @property
    def baseline_macs(self) -> int:
        return sum(self.before.values())

    def _head_dim_ratios(self) -> dict[str, float]:
        ratio = self.config.head_dim_ratio
        if ratio is None:
            return {}
        return {attention.projections[0]: ratio for attention in find_attention(self.network)}

    def name_shared(self) -> None:
        """Logs the layers that one call runs more than once, as those cannot be cut use by use."""
        calls: Counter[str] = Counter()
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
            for name, module in self.network.named_modules()
            if count_params(module, recurse=False)
        ]
        self._call(self.network)
        for hook in hooks:
            hook.remove()
        if shared := [name for name, count in calls.items() if count > 1]:
            logger.info("prune: used more than once, and cut alike for all uses: %s", ", ".join(shared))

    def slim(self) -> None:
        """Trains towards sparse BatchNorm scales (Liu et al. 2017), and remembers how sparse they became."""
        section = self.config.slimming
        if section is None:
            return
        before = _sparse_share(self.network)
        data = self.workload.train_data()
        result = train(self.network, self.workload, section, context=self.context, data=data, stage="prune")
        self.slimming = {"sparse_scales_ratio": [before, _sparse_share(self.network)], **result.to_json()}

    def prune_depth(self) -> None:
        if self.config.depth:
            self.rounds = prune_depth(self.context, self.network, self.config.depth)
            self._check_outputs(self.network)
            self._reload()

    @property
    def prunes_channels(self) -> bool:
        """Whether anything is asked for besides depth."""
        asked = (self.config.pruning_ratio, self.config.target_macs_ratio, *self.ratios.values())
        return any(asked) or any(self.head_ratios.values())

    def allocate(self, sensitivity: Report | None) -> None:
        """Finds a ratio for each group, by its name; groups with ratios of their own keep those."""
        if sensitivity is None or self.config.target_macs_ratio is None:
            raise ConfigError(
                "prune.pruning_ratio: auto needs prune.target_macs_ratio and the sensitivity of the baseline. Set "
                "prune.target_macs_ratio, and hand the stage what pruning_sensitivity measured."
            )
        measured = self.context.store.load_json(sensitivity)
        candidates = self._workable(self._candidates(), 1.0)
        curves = _curves(
            measured["rows"], [c for c in candidates if self.ratios.keys().isdisjoint(c.members)]
        )
        target = self.config.target_macs_ratio
        found = allocate(curves, lambda ratios: self._macs_ratio(candidates, 0.0, 1.0, ratios), target)
        if found is None:
            most = {part: max(point.ratio for point in points) for part, points in curves.items()}
            raise PruningError(
                f"prune.target_macs_ratio asks for {target:.3f} of the MACs, but the largest of "
                f"sensitivity.pruning_ratios leave {self._macs_ratio(candidates, 0.0, 1.0, most):.3f}"
                f"{self._what_is_left(self._cuts(candidates, 0.0, 1.0, most))}. Add larger "
                "ratios there, raise the target or prune.max_pruning_ratio, or ignore fewer layers."
            )
        self.allocated = found

    def run_step(self, step: int) -> None:
        """Prunes to the share of the whole that this step is due, and reloads the result from its record."""
        share = step / self.config.iterative_steps
        candidates = self._workable(self._candidates(), share)
        self.tried.clear()
        ratio = self._ratio(candidates, share)
        apply_cuts(
            self.network,
            self.inputs,
            self.workload.output_names,
            self._cuts(candidates, ratio, share, self.allocated),
        )
        self.ratios_used.append(ratio)
        self._check_outputs(self.network)
        self._reload()

    def _candidates(self) -> list[Candidate]:
        candidates = rank_candidates(self.context, self.network, self.config, self.ignored)
        for candidate in candidates:
            self.initial.setdefault(candidate.root, candidate.channels)
            self.initial_heads.setdefault(candidate.root, candidate.blocks)
        return candidates

    def _workable(self, candidates: list[Candidate], share: float) -> list[Candidate]:
        """Those without which the network's forward still works; each cut is tried alone where all together fail.

        Raises PruningError when that leaves none, or when cuts fail together that work alone.
        """
        whole = self.config.pruning_ratio
        ratio = _TRIED_RATIO if whole == "auto" or self.config.target_macs_ratio is not None else whole
        cuts = self._cuts(candidates, ratio * share, share, self.allocated)
        error = self._error_of(cuts)
        if error is None:
            return self._proven(candidates, cuts)
        errors = {cut.root: found for cut in cuts if (found := self._error_of([cut]))}
        if not errors or len(errors) == len(cuts):
            raise error
        for root, reason in errors.items():
            cause = str(reason).partition(". If ")[0]
            logger.warning("prune: %s and what shares channels with it stay whole: %s", root, cause)
        kept = [candidate for candidate in candidates if candidate.root not in errors]
        return self._proven(kept, [cut for cut in cuts if cut.root not in errors])

    def _proven(self, candidates: list[Candidate], cuts: list[Cut]) -> list[Candidate]:
        """Those whose channels are where they are thought to be."""
        names = self.workload.output_names
        graph = trace_dependencies(self.network, self.inputs, names)
        wrong = {
            cut.root
            for cut in cuts
            if not (cut.attention or is_proven(self.network, graph, self.inputs, names, cut))
        }
        if wrong:
            logger.warning(
                "prune: these layers, and what shares channels with them, stay whole, as joins, splits or views hide "
                "which channel is which: %s",
                ", ".join(sorted(wrong)),
            )
        return [candidate for candidate in candidates if candidate.root not in wrong]

    def _error_of(self, cuts: list[Cut]) -> PruningError | None:
        """What is wrong with the network after these cuts, on a copy."""
        try:
            self._check_outputs(self._cut_copy(cuts))
        except PruningError as exc:
            return exc
        return None

    def _cut_copy(self, cuts: list[Cut]) -> nn.Module:
        trial = copy.deepcopy(self.network)
        apply_cuts(trial, self.inputs, self.workload.output_names, cuts)
        return trial

    def _cuts(
        self, candidates: list[Candidate], ratio: float, share: float, allocated: dict[str, float]
    ) -> list[Cut]:
        return plan_cuts(
            candidates,
            ratio,
            {name: own * share for name, own in (allocated | self.ratios).items()},
            Limits(self.config.round_to, self.config.max_pruning_ratio, self.initial, self.initial_heads),
            ranked_globally=self.config.scope == "global",
            head_ratios={name: own * share for name, own in self.head_ratios.items()},
        )

    def _ratio(self, candidates: list[Candidate], share: float) -> float:
        target = self.config.target_macs_ratio
        if self.config.pruning_ratio == "auto":
            return 0.0
        if target is None:
            return self.config.pruning_ratio * share
        wanted = 1 - (1 - target) * share
        closest = self._macs_ratio(candidates, 1.0, share)
        if closest > wanted:
            raise PruningError(
                f"prune.target_macs_ratio asks for {wanted:.3f} of the MACs, but the most that can be pruned "
                f"leaves {closest:.3f}{self._what_is_left(self._cuts(candidates, 1.0, share, {}))}. Raise the target "
                "or prune.max_pruning_ratio, lower prune.round_to, or ignore fewer layers."
            )
        return _smallest_ratio(lambda ratio: self._macs_ratio(candidates, ratio, share), wanted)

    def _what_is_left(self, cuts: list[Cut]) -> str:
        """The modules with most of the MACs after these cuts, and how many of their channels stay."""
        network = self._cut_copy(cuts)
        macs = count_macs(network, self.inputs)
        total = sum(macs.values())
        largest = sorted((name for name in macs if macs[name]), key=lambda name: -macs[name])[:_LISTED]
        rows = [
            f"{name or 'the network itself'} ({macs[name] / total:.0%}{_kept(self.baseline, network, name)})"
            for name in largest
        ]
        return f", most of it in {', '.join(rows)}"

    def _macs_ratio(
        self,
        candidates: list[Candidate],
        ratio: float,
        share: float,
        allocated: dict[str, float] | None = None,
    ) -> float:
        """MACs that a ratio would leave, of a copy that is really cut and counted, once for the same cuts."""
        cuts = self._cuts(candidates, ratio, share, allocated or {})
        key = tuple((cut.root, len(cut.indices)) for cut in cuts)
        if key not in self.tried:
            trial = self._cut_copy(cuts)
            self._call(trial)
            self.tried[key] = total_macs(trial, self.inputs) / self.baseline_macs
        return self.tried[key]

    def _check_outputs(self, network: nn.Module) -> None:
        outputs = self._call(network)
        changed = [name for name, output in outputs.items() if output.shape != self.outputs[name].shape]
        if changed:
            raise PruningError(
                f"Pruning changed the shape of output {changed[0]!r} from "
                f"{tuple(self.outputs[changed[0]].shape)} to {tuple(outputs[changed[0]].shape)}. "
                "Add the layers that make it to prune.ignored_layers."
            )

    def _reload(self) -> None:
        """Puts the network as its record rebuilds it in the place of the cut one, after comparing them."""
        self.structure = describe_structure(self.workload.network(), self.network)
        rebuilt = build_network(self.workload, self.structure).eval()
        load_weights(rebuilt, network_tensors(self.network), source="the pruned network")
        sample, _ = self.workload.collate([self.workload.evaluation_data()[0]])
        names = self.workload.output_names
        expected, found = (checked_outputs(each, sample, names) for each in (self.network, rebuilt))
        if not all(torch.allclose(expected[name], found[name], equal_nan=True) for name in expected):
            raise PruningError(
                "The pruned network does not give the same outputs when it is rebuilt: it keeps state that "
                "is neither a tensor nor a plain attribute. Make it a buffer or a number of its module."
            )
        self.network = rebuilt

    def _call(self, network: nn.Module) -> Outputs:
        return checked_outputs(network, self.inputs, self.workload.output_names)


def _curves(rows: list[dict[str, Any]], candidates: list[Candidate]) -> dict[str, list[Point]]:
    """Measured damage of each group, as the rise of the loss; a group is known by any of its members."""
    curves: dict[str, list[Point]] = {}
    for candidate in candidates:
        for row in rows:
            if not set(row["members"]).isdisjoint(candidate.members):
                damage = math.inf if row["loss_rise"] is None else row["loss_rise"]
                point = Point(row["ratio"], damage, 1 - row["macs_ratio"])
                curves.setdefault(candidate.members[0], []).append(point)
    return curves


def _smallest_ratio(macs_ratio: Callable[[float], float], wanted: float) -> float:
    """Smallest pruning ratio whose MACs are at most ``wanted``, by bisection; those of ratio 1 are."""
    low, high = 0.0, 1.0
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if macs_ratio(middle) <= wanted else (middle, high)
    return high


def _kept(before: nn.Module, after: nn.Module, name: str) -> str:
    """Words for how many channels of a layer stay; none for what has no channels of its own."""
    old, new = (_out_channels(network.get_submodule(name)) for network in (before, after))
    return f", {new} of {old} channels" if new else ""


def _out_channels(module: nn.Module) -> int | None:
    return getattr(module, "out_channels", None) or getattr(module, "out_features", None)


def _finetune_between(
    context: StageContext,
    baseline: Checkpoint,
    network: nn.Module,
    config: PruneConfig,
    finetune_config: FinetuneConfig,
) -> None:
    taught = finetune_config.distillation is not None
    train(
        network,
        context.workload,
        finetune_config.model_copy(update={"epochs": config.finetune_epochs_between}),
        context=context,
        data=context.workload.train_data(),
        teacher=load_network(context.workload, baseline, context.store) if taught else None,
        stage="prune",
    )


def _output(context: StageContext, baseline: Checkpoint, pruner: _Pruner) -> StageOutput:
    macs = total_macs(pruner.network, pruner.inputs)
    metrics = {
        "params": float(count_params(pruner.network)),
        "macs": float(macs),
        "macs_ratio": macs / pruner.baseline_macs,
    } | evaluate(context.workload, pruner.network, device=context.device)
    handle = save_checkpoint(
        context.store,
        pruner.network,
        structure=pruner.structure,
        parents=(baseline.sha256,),
        metadata={"stage": "pruned", "macs_ratio": metrics["macs_ratio"]},
    )
    report = context.store.add_json(_report(pruner, metrics), parents=(handle.sha256,))
    return StageOutput(
        handle=handle, files={"pruning.json": report}, metrics=metrics, notes=_notes(pruner, metrics)
    )


def _notes(pruner: _Pruner, metrics: dict[str, float]) -> tuple[str, ...]:
    """What was chosen besides channels by one ratio."""
    removed = [each.removed for each in pruner.rounds]
    depth = (
        [f"left out, by {pruner.config.depth.importance}: {', '.join(removed)}."]
        if pruner.config.depth
        else []
    )
    if not pruner.allocated:
        return tuple(depth)
    ranked = sorted(pruner.allocated.items(), key=lambda item: item[1])
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ranked)
    return (
        *depth,
        f"prune.pruning_ratio auto leaves {metrics['macs_ratio']:.3f} of the MACs at the least rise of the loss that "
        f"its sensitivity predicts, by these ratios: {ratios}.",
    )


def _report(pruner: _Pruner, metrics: dict[str, float]) -> dict[str, Any]:
    pruner.network.cpu()
    after = count_macs(pruner.network, pruner.inputs)
    left_over = dict(pruner.network.named_modules())
    rows = []
    for name, old in pruner.baseline.named_modules():
        new = left_over.get(name)
        held, left = (count_params(module, recurse=False) if module else 0 for module in (old, new))
        if held:
            rows.append(
                {
                    "module": name,
                    "type": type(old).__name__,
                    "shape_before": _weight_shape(old),
                    "shape_after": _weight_shape(new) if new and left else [],
                    "params_before": held,
                    "params_after": left,
                    "macs_before": pruner.before.get(name, 0),
                    "macs_after": after.get(name, 0),
                }
            )
    return {
        "schema_version": 1,
        "ratios": pruner.ratios_used,
        "metrics": metrics,
        "allocated": pruner.allocated,
        "slimming": pruner.slimming,
        "depth": [asdict(each) for each in pruner.rounds],
        "attention": _attention_rows(pruner),
        "modules": rows,
    }


def _sparse_share(network: nn.Module) -> float:
    """Share of BatchNorm scales below a hundredth of the largest."""
    scales = batchnorm_scales(network).detach().abs()
    return float((scales < _SPARSE_BELOW * scales.max()).float().mean())


def _attention_rows(pruner: _Pruner) -> list[dict[str, Any]]:
    before, after = (
        {attention.name: attention for attention in find_attention(network)}
        for network in (pruner.baseline, pruner.network)
    )
    return [
        {
            "module": name,
            "heads_before": before[name].heads,
            "heads_after": left.heads,
            "head_dim_before": before[name].width // before[name].heads,
            "head_dim_after": left.width // left.heads,
        }
        for name, left in after.items()
    ]


def _weight_shape(module: nn.Module) -> list[int]:
    """Shape of the first parameter, as a reviewer knows the layer."""
    return list(next(module.parameters(recurse=False)).shape)
