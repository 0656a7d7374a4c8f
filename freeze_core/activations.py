"""Activations of a forward pass, as recorded: plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from freeze_core.vocabulary import Role

__all__ = ["LayerActivations", "Recording"]


@dataclass(frozen=True, eq=False)
class LayerActivations:
    """The activations of one attention layer, detached, in the model's dtype.

    Of a layer that each pass runs several times (HRM) all are `[run, ...]`, in the order in which it ran.

    Args:
        q: queries `[batch, token, head, head_dim]`, after the bias, before per-head norms and rotary positions.
        k, v: keys and values `[batch, token, kv_head, head_dim]`, at the same place; one a query head where a freeze
            under `kv_scope="head"` has unshared them.
        z: each head's mixed values, the input of the output projection `[batch, token, head, head_dim]`.
        pattern: attention probabilities `[batch, head, token, key]`, if asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    pattern: Tensor | None = None


class Recording(Mapping[int, LayerActivations]):
    """A mapping from layer to its activations.

    Args:
        layers: the activations.
        attention_mask: the padding mask `[batch, token]` that their stack of layers was given.
        encoder_attention_mask: that of the encoder's states, which a decoder's cross-attention reads.
        attention: whose they are: `self`, `cross` or `encoder`.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerActivations],
        attention_mask: Tensor | None,
        encoder_attention_mask: Tensor | None = None,
        attention: str = "self",
    ) -> None:
        self._layers = dict(layers)
        self.attention_mask = attention_mask
        self.encoder_attention_mask = encoder_attention_mask
        self.attention = attention

    def mask_of(self, role: Role) -> Tensor | None:
        """The padding mask `[batch, token]` of the tokens that the activations of `role` belong to."""
        of_encoder = self.attention == "cross" and role in ("k", "v")
        return self.encoder_attention_mask if of_encoder else self.attention_mask

    def tensors(self) -> dict[str, Tensor]:
        """All of them by a name that says whose they are."""
        activations = {
            f"{layer}.{field.name}": values
            for layer, one in self._layers.items()
            for field in fields(one)
            if (values := getattr(one, field.name)) is not None
        }
        masks = {"attention_mask": self.attention_mask, "encoder_attention_mask": self.encoder_attention_mask}
        return activations | {name: mask for name, mask in masks.items() if mask is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], attention: str) -> Recording:
        """What gave these `tensors`.

        Raises:
            TypeError, ValueError: one is missing, or no such thing.
        """
        masks = ("attention_mask", "encoder_attention_mask")
        layers: dict[int, dict[str, Tensor]] = {}
        for name in sorted(tensors.keys() - masks):
            layer, _, role = name.partition(".")
            layers.setdefault(int(layer), {})[role] = tensors[name]
        activations = {layer: LayerActivations(**layers[layer]) for layer in sorted(layers)}
        return cls(activations, tensors.get("attention_mask"), tensors.get("encoder_attention_mask"), attention)

    def __getitem__(self, layer: int) -> LayerActivations:
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Recording(layers={list(self._layers)})"
