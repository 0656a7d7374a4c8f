"""What a user calls: freeze circuits of a model, look at it, and check that the freeze does what it says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from freeze_core.activations import Recording
from freeze_core.arguments import check_choice, check_flag, refuse
from freeze_core.attention.sites import find_sites
from freeze_core.calibration import calibrate
from freeze_core.config import InterventionConfig, check_config, check_fields, check_on_stale_cache
from freeze_core.diagnostics import gradient_behavior, intervention_effect
from freeze_core.errors import InterventionError, UnsupportedModelError, shown
from freeze_core.freezing.install import FreezeHandle, FrozenCircuits, install
from freeze_core.freezing.pass_arguments import returned_cache
from freeze_core.freezing.requests import resolve
from freeze_core.inputs import model_arguments, run
from freeze_core.recording import record
from freeze_core.statistics import ActivationStatistics
from freeze_core.vocabulary import CircuitType, ModelArchitecture

__all__ = ["AttentionCircuitFreezer", "freeze_ov_circuit", "freeze_qk_circuit"]


class AttentionCircuitFreezer:
    """Freezes the QK and OV circuits of attention heads in Hugging Face models.

    Args:
        debug_gradients: print a table of gradients in `check_gradient_behavior`.
        on_stale_cache: `warn`, `error` or `ignore` a cache that was filled without the freeze it is used under.

    Example:
        >>> freezer = AttentionCircuitFreezer()
        >>> config = InterventionConfig(layer_indices=[0], head_indices=[1, 2], circuit="qk")
        >>> with freezer.freeze_circuits(model, config):  # doctest: +SKIP
        ...     logits = model(input_ids).logits
    """

    def __init__(
        self, debug_gradients: bool = False, on_stale_cache: Literal["warn", "error", "ignore"] = "warn"
    ) -> None:
        check_flag("debug_gradients", debug_gradients)
        check_on_stale_cache(on_stale_cache)
        self.debug_gradients = debug_gradients
        self.on_stale_cache = on_stale_cache

    def freeze_circuits(
        self,
        model: nn.Module,
        config: InterventionConfig | Sequence[InterventionConfig],
        architecture: ModelArchitecture | str | None = None,
    ) -> FrozenCircuits:
        """Installs one config, or several in order, the later one winning where they meet.

        Args:
            model: any Hugging Face model; neither copied nor trained on, and what it was again after removal.
            config: what to freeze; changing it later does not change a live freeze.
            architecture: how q, k and v are stored, for a model that detection does not know.

        Returns:
            A sequence of handles, one a config, and a context manager that removes them all.

        Raises:
            UnsupportedModelError: the model cannot be served; nothing is installed.
            InterventionError: the config cannot be served on this model; nothing is installed.
        """
        configs = [config] if isinstance(config, InterventionConfig) else config
        if not isinstance(configs, Sequence) or isinstance(configs, str | bytes) or not configs:
            refuse("config", config, "an InterventionConfig or a list of some")
        for one in configs:
            check_config(one)
        stated = _architecture(architecture)
        resolved = []
        for one in configs:
            checked = one.checked()
            sites = find_sites(model, stated, checked.attention)
            resolved.append((sites, resolve(checked, sites)))
        return install(resolved, self.on_stale_cache)

    def remove_hooks(self, handles: FrozenCircuits | FreezeHandle | Iterable[FreezeHandle]) -> None:
        """Removes what `freeze_circuits` returned; twice is harmless."""
        several = [handles] if isinstance(handles, FreezeHandle) else handles
        if not isinstance(several, Iterable) or isinstance(several, str | bytes):
            refuse("handles", handles, "what freeze_circuits returned")
        listed = list(several)
        for handle in listed:
            if not isinstance(handle, FreezeHandle):
                raise InterventionError(f"handles={shown(handles)}: {shown(handle)} is no handle of freeze_circuits")
        FrozenCircuits(listed).remove()

    def detect_architecture(self, model: nn.Module) -> ModelArchitecture:
        """How the model stores its query, key and value projections.

        `flash_attention` is attention that exposes no projection to freeze.

        Raises:
            UnsupportedModelError: a model without attention, or with one whose storage is not known.
        """
        try:
            sites = find_sites(model)
        except UnsupportedModelError:
            if isinstance(model, nn.Module) and _hides_projections(model):
                return ModelArchitecture.FLASH_ATTENTION
            raise
        return next(iter(sites.by_layer.values())).layout.architecture

    def get_model_config(self, model: nn.Module) -> dict[str, Any]:
        """What the model's attention looks like.

        Returns:
            `num_layers` (decoder layers), `num_heads` (query heads), `num_kv_heads`, `head_dim` (features),
            `architecture` (a `ModelArchitecture`), `attention_type` (`MHA`, `GQA` or `MQA`), and `layers`, the
            same head counts for each layer that has attention. The former are those of the first such layer.

        Raises:
            UnsupportedModelError: the model cannot be served.
        """
        sites = find_sites(model)
        layers = {
            layer: {"num_heads": site.heads, "num_kv_heads": site.kv_heads, "head_dim": site.layout.head_dim}
            for layer, site in sites.by_layer.items()
        }
        first = next(iter(sites.by_layer.values()))
        kind = "MHA" if first.group == 1 else "MQA" if first.kv_heads == 1 else "GQA"
        return {
            "num_layers": sites.layers,
            **layers[first.layer],
            "architecture": first.layout.architecture,
            "attention_type": kind,
            "layers": layers,
        }

    def record(
        self,
        model: nn.Module,
        inputs: Tensor | Mapping[str, Any],
        layers: Sequence[int] | None = None,
        pattern: bool = False,
        device: torch.device | str | None = None,
        attention: str = "self",
    ) -> Recording:
        """The activations of a forward pass on `inputs`; see `freeze_core.recording.record`."""
        return record(model, inputs, layers, pattern, device, attention)

    def calibrate(
        self,
        model: nn.Module,
        batches: Iterable[Tensor | Mapping[str, Any]],
        layers: Sequence[int] | None = None,
        progress: bool = True,
        attention: str = "self",
    ) -> ActivationStatistics:
        """Activation statistics over a data set, for `statistics=`; see `freeze_core.calibration.calibrate`."""
        return calibrate(model, batches, layers, progress, attention)

    def recompute_cache(self, model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Any:
        """A key-value cache filled anew, under the freezes that are live now.

        Args:
            inputs: all tokens that the cache is to hold: ids `[batch, token]`, embeddings, or a dict of arguments.

        Returns:
            The cache that the model returns.

        Raises:
            InterventionError: the model makes no cache.
        """
        find_sites(model)
        with torch.no_grad():
            output = run(model, {**model_arguments(model, inputs), "use_cache": True})
        cache = returned_cache(output)
        if cache is None:
            raise InterventionError(
                f"{type(model).__name__} returned no cache of keys and values: run it without one (use_cache=False)"
            )
        return cache

    def check_gradient_behavior(
        self, model: nn.Module, test_input: Tensor, config: InterventionConfig
    ) -> dict[str, Any]:
        """Whether gradients at the frozen activations obey the backward mode's identity, exactly where it is exact.

        A model that is already frozen with `config` is not frozen twice. No parameter's `.grad` is touched.

        Args:
            test_input: token ids `[batch, token]` (integer) or embeddings `[batch, token, hidden]` (floating).

        Returns:
            `validation_passed`; `loss_value`, the mean square of the logits that was differentiated;
            `parameters`, for each that requires a gradient its `norm`, `mean`, `max` (of magnitudes) and
            `nonzero` (share, 0 to 1), or `None` where nothing flows; `sites`, for each frozen projection whether
            it `passed`, its largest `deviation` from the identity, the `bound` on it, `heads`, the same four
            numbers of the gradient at each head before the freeze, and `rows`, those of its own parameters, the rows
            that make frozen features apart from the others; `notes`, what looks like a fault and is none.

        Raises:
            CircuitFreezeError: the model, the input or the config cannot be served.
        """
        return gradient_behavior(model, test_input, config, print_table=self.debug_gradients)

    def verify_intervention_effect(
        self,
        model_baseline: nn.Module,
        model_intervened: nn.Module,
        test_input: Tensor,
        config: InterventionConfig,
    ) -> dict[str, Any]:
        """How far the freeze moves the logits.

        Both passes draw the same dropout, and torch's generators are put back afterwards.

        Args:
            model_baseline: unfrozen; may be the same object as `model_intervened` if that is unfrozen too.
            model_intervened: frozen with `config` already, or frozen with it for this call.
            test_input: token ids `[batch, token]` (integer) or embeddings `[batch, token, hidden]` (floating).

        Returns:
            `max_absolute_diff` and `mean_absolute_diff` in units of the logits, `changed` (whether any logit did), and
            `heads`, for each query head of each layer the `norm`, `mean`, `max` (of magnitudes) and `nonzero` (share)
            of the change of its z, and whether it is `frozen`, itself or along with one that shares its KV head.

        Raises:
            CircuitFreezeError: a baseline that is frozen, or what `freeze_circuits` raises.
        """
        return intervention_effect(model_baseline, model_intervened, test_input, config)


def freeze_qk_circuit(
    model: nn.Module, layer_indices: Sequence[int] | None, head_indices: Sequence[int] | None, **fields: Any
) -> FrozenCircuits:
    """Freezes where heads look: `q` and `k` of `head_indices` in `layer_indices`.

    Args:
        fields: other fields of `InterventionConfig`, `circuit` excepted.
    """
    return _freeze(CircuitType.QK, model, layer_indices, head_indices, fields)


def freeze_ov_circuit(
    model: nn.Module, layer_indices: Sequence[int] | None, head_indices: Sequence[int] | None, **fields: Any
) -> FrozenCircuits:
    """Freezes what heads move: `v` of `head_indices` in `layer_indices`.

    Args:
        fields: other fields of `InterventionConfig`, `circuit` excepted.
    """
    return _freeze(CircuitType.OV, model, layer_indices, head_indices, fields)


def _freeze(
    circuit: CircuitType,
    model: nn.Module,
    layer_indices: Sequence[int] | None,
    head_indices: Sequence[int] | None,
    fields: Mapping[str, Any],
) -> FrozenCircuits:
    check_fields(fields, {"circuit"})
    config = InterventionConfig(layer_indices, head_indices, circuit, **fields)
    return AttentionCircuitFreezer().freeze_circuits(model, config)


def _architecture(value: ModelArchitecture | str | None) -> ModelArchitecture | None:
    if value is None:
        return None
    check_choice("architecture", value, ModelArchitecture)
    architecture = ModelArchitecture(value)
    if architecture == ModelArchitecture.FLASH_ATTENTION:
        raise UnsupportedModelError(
            "architecture='flash_attention': attention that exposes no projection cannot be frozen; a model that runs "
            "flash attention on its own projections needs no architecture to be stated"
        )
    return architecture


def _hides_projections(model: nn.Module) -> bool:
    """Whether some attention module has no linear projection of its own that runs as a module."""
    return any(
        isinstance(module, nn.MultiheadAttention)
        or ("Attention" in type(module).__name__ and not any(hasattr(child, "weight") for child in module.children()))
        for module in model.modules()
    )
