"""Records what attention heads read and wrote in one forward pass, with the model's own attention code."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freeze_core.activations import LayerActivations, Recording
from freeze_core.arguments import check_flag
from freeze_core.attention.layout import AttentionSite
from freeze_core.attention.shards import gathered_from, shard_of
from freeze_core.attention.sites import find_sites
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError, UnsupportedModelError, shown, with_newer_versions
from freeze_core.forward_patch import patch_on
from freeze_core.freezing.frozen_modules import FrozenOutput, frozen_attention
from freeze_core.freezing.padding_mask import UnknownMask, given_masks, prompt_of, select_padding_mask
from freeze_core.freezing.pass_arguments import ForwardArguments
from freeze_core.freezing.requests import resolve
from freeze_core.generators import Generators
from freeze_core.inputs import model_arguments, run

__all__ = ["hearing_patterns", "record", "under_eager"]


def record(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    layers: Sequence[int] | None = None,
    pattern: bool = False,
    device: torch.device | str | None = None,
    attention: str = "self",
) -> Recording:
    """Records q, k, v, z and, if asked, the patterns of one forward pass; under a freeze, the frozen values.

    Patterns are only formed by eager attention: for them a model that runs another implementation is run once
    more under eager, and put back.

    Args:
        model: any model that can be frozen; it runs as it is, in its own mode, without gradients.
        inputs: token ids `[batch, token]`, embeddings `[batch, token, hidden]`, or a dict of model arguments.
        layers: decoder layers, negative ones count from the end; `None` is all that have attention.
        pattern: record patterns too.
        device: where each layer's activations are put as they come by, such as `"cpu"`; `None` leaves them in place.
        attention: `self` and `cross` of the decoder, or of the only stack of layers; `encoder` is the encoder's own.

    Raises:
        UnsupportedModelError: the model cannot be served, or forms no patterns.
        InterventionError: a layer that is out of range, inputs or a device that are none, or an activation that did not
            come by.
    """
    config = InterventionConfig(layer_indices=layers, attention=attention)
    sites = find_sites(model, attention=config.attention)
    wanted = [freeze.layer for freeze in resolve(config, sites)]
    check_flag("pattern", pattern)
    device = _device(device)
    arguments = model_arguments(model, inputs)
    passes: dict[nn.Module, list[_Masks]] = {module: [] for module in (sites.stack, sites.composite) if module}
    seen: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    generators = Generators(model)
    start = generators.states()
    with ExitStack() as stack, torch.no_grad():
        # Compiled code does not call hooks that were registered after it was compiled, be it a layer's or the model's.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in wanted:
            stack.enter_context(_listening(sites.by_layer[layer], seen, device))
        for module, masks in passes.items():
            stack.callback(module.register_forward_pre_hook(_mask_keeper(module, masks), with_kwargs=True).remove)
        run(model, arguments)
    if len(passes[sites.stack]) > 1:
        raise InterventionError(
            f"{type(sites.stack).__name__} ran {len(passes[sites.stack])} times in one forward pass of "
            f"{type(model).__name__}, each time on other inputs, so that an activation has several values: record "
            f"through {sites.stack_name or 'the stack of layers'}, on the inputs of one of them"
        )
    if pattern:
        after = generators.states()
        generators.put(start)  # in training mode both passes draw the same dropout
        _patterns(model, arguments, [sites.by_layer[layer] for layer in wanted], seen, device)
        generators.put(after)
    activations = {layer: _activations(sites.by_layer[layer], seen, pattern) for layer in wanted}
    given = [mask for calls in passes.values() for call in calls for mask in call.own]
    mask = _copied("attention_mask", select_padding_mask(given, prompt_of(sites.stack)))
    of_encoder = _copied("encoder_attention_mask", next((call.of_encoder for call in passes[sites.stack]), None))
    return Recording(activations, mask, of_encoder, attention)


def _device(device: object) -> torch.device | None:
    if device is None:
        return None
    try:
        # Whatever was given: torch says what it takes for a device, and whether this machine has it.
        return torch.empty(0, device=device).device  # type: ignore[call-overload, no-any-return]
    except (RuntimeError, TypeError, AssertionError) as error:
        raise InterventionError(f"device={shown(device)}: must be None or a device of this machine: {error}") from error


class _Masks(NamedTuple):
    """The masks of one call: those of the module's tokens, as `given_masks` gives them, and that of the encoder's."""

    own: list[Any]
    of_encoder: Any


def _mask_keeper(module: nn.Module, calls: list[_Masks]) -> Callable[..., None]:
    """Keeps the masks that this very module is given: an encoder and a decoder pad differently."""
    arguments = ForwardArguments(module, module.forward)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = arguments.bind(args, kwargs)
        calls.append(_Masks(given_masks(arguments, named), named.get("encoder_attention_mask")))

    return keep


def _copied(name: str, mask: Any) -> Tensor | None:
    if mask is not None and not isinstance(mask, Tensor):
        reason = mask.reason if isinstance(mask, UnknownMask) else f"{name} is a {type(mask).__name__}"
        raise InterventionError(
            f"{reason}: which of the recorded tokens are padding is unknown; pass a padding mask [batch, token] as "
            f"{name}"
        )
    return None if mask is None else mask.clone()


@contextmanager
def _listening(
    site: AttentionSite, seen: Mapping[tuple[int, str], list[Tensor]], device: torch.device | None
) -> Iterator[None]:
    """Splits what the projections give, and the output projection takes, into heads; copies, put on `device`."""
    frozen = frozen_attention(site.attention)
    storage = frozen.plan.storage if frozen else site.layout.shared
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if name in outputs:
                raise InterventionError(
                    f"{name} of {site.name} runs several times before its attention does: there is no one activation "
                    "to record"
                )
            output = gathered_from(module, 0, output, storage.widths[name], f"{name} of {site.name}")
            _refuse_shard(site, name, output, storage.widths[name])
            # Hooks of others come later, and may write to it.
            copy = len(module._forward_hooks) > 1
            outputs[name] = output.detach().flatten(1, -2).to(device or output.device, copy=copy)

        return hook

    def keep_z(given: Tensor) -> None:
        width = site.layout.z.numel()
        given = gathered_from(site.layout.output, 1, given, width, f"z of {site.name}")
        _refuse_shard(site, "z", given, width)
        z = given.detach().unflatten(-1, (site.heads, -1))
        seen[site.layer, "z"].append(z.to(device or z.device, copy=True))

    def split(module: nn.Module, args: Any, output: Any) -> None:
        for role, parts in storage.features.items():
            if all(part.module in outputs for part in parts):
                heads = max(len(part.features) for part in parts)
                pieces = [outputs[part.module][..., part.features].expand(-1, -1, heads, -1) for part in parts]
                seen[site.layer, role].append(torch.cat(pieces, dim=-1))
        outputs.clear()

    with ExitStack() as stack:
        for name, module in storage.modules.items():
            # Before the hooks of others, since a freeze acts before them: it does not hold what they make of it.
            stack.callback(module.register_forward_hook(keep(name), prepend=True).remove)
        stack.callback(_listening_to_z(site, keep_z))
        stack.callback(site.attention.register_forward_hook(split).remove)
        yield


def _listening_to_z(site: AttentionSite, keep: Callable[[Tensor], None]) -> Callable[[], None]:
    """Hands over what is projected, also where z is frozen; gives what ends it."""
    frozen = patch_on(site.layout.output, FrozenOutput)
    if frozen:
        frozen.listeners.append(keep)
        return lambda: frozen.listeners.remove(keep)
    return site.layout.output.register_forward_pre_hook(lambda module, args: keep(args[0])).remove


def _refuse_shard(site: AttentionSite, what: str, activation: Tensor, width: int) -> None:
    if activation.shape[-1] != width:
        raise UnsupportedModelError(
            f"{what} of {site.name} has {activation.shape[-1]} features where {width} were expected: its heads are not "
            "where they were found, and no DTensor weight says which of them this process has; record a model that is "
            "not sharded"
        )


def _patterns(
    model: nn.Module,
    arguments: Mapping[str, Any],
    sites: Sequence[AttentionSite],
    seen: Mapping[tuple[int, str], list[Tensor]],
    device: torch.device | None,
) -> None:
    def keep(site: AttentionSite, pattern: Tensor) -> None:
        seen[site.layer, "pattern"].append(pattern.detach().to(device or pattern.device))

    with hearing_patterns(model, sites, keep), torch.no_grad():
        run(model, arguments)


@contextmanager
def hearing_patterns(
    model: nn.Module, sites: Sequence[AttentionSite], keep: Callable[[AttentionSite, Tensor], None]
) -> Iterator[None]:
    """Hands over each pattern `[batch, head, token, key]` as it is formed; the model runs under eager attention."""

    # The model itself is not asked for attentions: transformers would leave hooks of its own behind.
    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_attentions": True}

    def keeper(site: AttentionSite) -> Callable[..., None]:
        def hand_over(module: nn.Module, args: Any, output: Any) -> None:
            given = [value for value in output if isinstance(value, Tensor)] if isinstance(output, tuple) else []
            by_head = [value for value in given if value.dim() == 4 and value.shape[1] == site.heads]
            if by_head:  # T5 gives the bias on its scores first
                keep(site, by_head[-1])
            elif shard_of(site.layout.output, 1, site.layout.z.numel()):
                raise UnsupportedModelError(
                    f"the patterns of {site.name} are sharded: under tensor parallelism a process forms those of its "
                    "own heads only; use a model that is not sharded, or record without pattern=True"
                )

        return hand_over

    with ExitStack() as stack, under_eager(model):
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # as in `record`
        for site in sites:
            if "output_attentions" in inspect.signature(type(site.attention).forward).parameters:
                stack.callback(site.attention.register_forward_pre_hook(ask, with_kwargs=True).remove)
            stack.callback(site.attention.register_forward_hook(keeper(site)).remove)
        yield


@contextmanager
def under_eager(model: nn.Module) -> Iterator[None]:
    """Runs the model under eager attention, then under what it ran before."""
    configs: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation") and not any(config is one for one in configs):
            configs.append(config)
    before = [config._attn_implementation for config in configs]
    if not configs:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config that says which attention it runs: its patterns cannot be recorded"
        )
    # Not set_attn_implementation: some families read the config in each pass and yet do not accept that call.
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):  # outer ones first, since they set inner ones
            config._attn_implementation = implementation


def _activations(site: AttentionSite, seen: Mapping[tuple[int, str], list[Tensor]], pattern: bool) -> LayerActivations:
    names = ["q", "k", "v", "z", *(["pattern"] if pattern else [])]
    runs = max(len(seen[site.layer, name]) for name in names)
    missing = [name for name in names if len(seen[site.layer, name]) < max(runs, 1)]
    if missing:
        message = (
            f"layer {site.layer} ({site.name}) gave no {', '.join(missing)} in this pass: the layer did not run, or "
            "its attention does not form them"
        )
        raise InterventionError(with_newer_versions(message))
    return LayerActivations(
        **{name: seen[site.layer, name][0] if runs == 1 else torch.stack(seen[site.layer, name]) for name in names}
    )
