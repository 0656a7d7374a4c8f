"""`head_circuits`: the QK and the OV circuit of a head as matrices, in factors.

N. Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021: what a head does to the residual stream is
two matrices `[hidden, hidden]` of low rank, one that scores pairs of tokens and one that maps what is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from freeze_core.arguments import check_flag, is_distinct, is_int, refuse
from freeze_core.attention.layout import AttentionSite
from freeze_core.attention.shards import unsharded
from freeze_core.circuits.bilinear import score_form
from freeze_core.circuits.linear import Affine
from freeze_core.circuits.maps import layer_around, norm_before, reading_map, writing_map
from freeze_core.circuits.moved import not_moved, recorded
from freeze_core.circuits.observing import observed, undisturbed
from freeze_core.config import InterventionConfig
from freeze_core.errors import InterventionError, UnsupportedModelError, shown
from freeze_core.freezing.requests import resolve
from freeze_core.freezing.unfrozen import unfrozen_sites
from freeze_core.vocabulary import Role

__all__ = ["Factored", "HeadCircuits", "head_circuits"]

READ: tuple[Role, ...] = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class Factored:
    """A matrix of low rank as `left @ right`: `[rows, rank]`, `[rank, columns]`."""

    left: Tensor
    right: Tensor

    def matrix(self) -> Tensor:
        """The product `[rows, columns]`."""
        return self.left @ self.right

    def eigenvalues(self) -> Tensor:
        """The eigenvalues that are not 0 `[rank]`, complex: those of the small product `right @ left`.

        Raises:
            InterventionError: the matrix is not square.
        """
        if len(self.left) != self.right.shape[1]:
            raise InterventionError(f"a matrix {[len(self.left), self.right.shape[1]]} has no eigenvalues")
        found: Tensor = torch.linalg.eigvals((self.right @ self.left).double().cpu())
        return found

    def singular_values(self) -> Tensor:
        """The singular values that are not 0 `[rank]`, largest first."""
        left, right = (torch.linalg.qr(one.double().cpu()).R for one in (self.left, self.right.T))
        found: Tensor = torch.linalg.svdvals(left @ right.T)
        return found


@dataclass(frozen=True, eq=False)
class HeadCircuits:
    """What a head's weights do, in float32 or wider, and read, where norms are folded, from the residual stream.

    With `x` `[token, hidden]` what the attention takes, `x @ W_Q + b_Q` is the head's query as `record` has it: before
    rotary positions and norms of each head. Where `folded`, `x` is the residual stream divided by its root mean square,
    or, before a layer norm, by its standard deviation: the norm's weight and bias, and the subtraction of the mean, are
    in `W` and `b`. What cannot be had raises `UnsupportedModelError`, with its reason, when it is asked for.

    Args:
        layer: the decoder layer.
        head: the query head.
        kv_head: the KV head that it reads.
        folded: whether the norm before the attention is in `W_Q`, `W_K` and `W_V`.
        maps: of `q`, `k`, `v` the map from `x`, of `z` that to what the output projection gives, or why there is none.
        forms: by offset, `M` `[head_dim, head_dim]` of the score `q M k`, or why there is none.
        not_moved: why the head's z is not its pattern times its values, if it is not.
    """

    layer: int
    head: int
    kv_head: int
    folded: bool
    maps: Mapping[Role, Affine | str]
    forms: Mapping[int, Tensor] | str
    not_moved: str = ""

    @property
    def W_Q(self) -> Tensor:
        """`[hidden, head_dim]`."""
        return self._map("q").weight

    @property
    def W_K(self) -> Tensor:
        """`[hidden, head_dim]`, of the KV head."""
        return self._map("k").weight

    @property
    def W_V(self) -> Tensor:
        """`[hidden, value_dim]`, of the KV head."""
        return self._map("v").weight

    @property
    def W_O(self) -> Tensor:
        """`[value_dim, hidden]`: the head's rows of the output projection, whose bias is no head's."""
        return self._map("z").weight

    @property
    def b_Q(self) -> Tensor:
        """`[head_dim]`."""
        return self._map("q").bias

    @property
    def b_K(self) -> Tensor:
        """`[head_dim]`."""
        return self._map("k").bias

    @property
    def b_V(self) -> Tensor:
        """`[value_dim]`."""
        return self._map("v").bias

    def qk(self, offset: int = 0) -> Factored:
        """`W_Q M W_K^T` `[hidden, hidden]`: the score, before the softmax, of a token and one `offset` before it.

        Scaling and rotary positions are in `M`, as the model has them; without rotary positions it is the same for
        every offset. Biases of query and key make terms besides, of one of the two tokens.

        Raises:
            UnsupportedModelError: the score is not bilinear.
            InterventionError: an offset that `head_circuits` was not asked for.
        """
        if isinstance(self.forms, str):
            raise UnsupportedModelError(self.forms)
        if offset not in self.forms:
            raise InterventionError(
                f"offset={shown(offset)}: must be one that head_circuits was given: {', '.join(map(str, self.forms))}"
            )
        return Factored(self.W_Q @ self.forms[offset], self.W_K.T)

    @property
    def ov(self) -> Factored:
        """`W_V W_O` `[hidden, hidden]`: what a token that is looked at adds to what the output projection gives.

        Raises:
            UnsupportedModelError: z is not the pattern times the values, or a projection is not linear.
        """
        if self.not_moved:
            raise UnsupportedModelError(self.not_moved)
        return Factored(self.W_V, self.W_O)

    def _map(self, role: Role) -> Affine:
        found = self.maps[role]
        if isinstance(found, str):
            raise UnsupportedModelError(found)
        return found


def head_circuits(
    model: nn.Module,
    layer: int,
    head: int,
    *,
    offsets: Sequence[int] = (0,),
    fold_norm: bool = False,
    attention: str = "self",
) -> HeadCircuits:
    """The QK and the OV circuit of a head, from whatever holds its weights.

    Which features are the head's is what freezing goes by; their matrices are the derivatives of the modules that give
    them, each held against what the module does. The model runs on a few drawn tokens, in eval mode, and is left as it
    was.

    Args:
        model: unfrozen.
        layer: a decoder layer; negative ones count from the end.
        head: a query head, in the same way.
        offsets: how many tokens before the query the key is, for `HeadCircuits.qk`; of rotary positions each has a
            matrix of its own. Negative ones, of keys that come later, where the attention sees them.
        fold_norm: put what is linear in the norm before the attention into `W_Q`, `W_K` and `W_V`.
        attention: `self`, `cross` (whose keys and values read the encoder's states) or `encoder`.

    Raises:
        UnsupportedModelError: the model cannot be served, or has no norm there that could be folded. What one circuit
            alone lacks is told when it is asked for.
        InterventionError: an argument that is not allowed, an offset at which nothing is seen, or a frozen model.

    Example:
        >>> circuits = head_circuits(model, 0, 3, offsets=range(4))  # doctest: +SKIP
        >>> circuits.ov.eigenvalues(), circuits.qk(1).matrix()  # doctest: +SKIP
    """
    if not is_distinct(offsets, is_int):
        refuse("offsets", offsets, "a sequence of distinct ints, as range(4)")
    check_flag("fold_norm", fold_norm)
    for name, value in (("layer", layer), ("head", head)):
        if not is_int(value):
            refuse(name, value, "an int")
    with torch.inference_mode(False):  # whose tensors have no derivatives
        config = InterventionConfig([layer], [head], attention=attention)
        sites = unfrozen_sites(model, attention)
        (freeze,) = resolve(config, sites)
        site, number = sites.by_layer[freeze.layer], freeze.heads[0]
        maps = _maps(model, site, number, layer_around(model, sites, site), fold_norm)
        forms: dict[int, Tensor] | str
        try:
            forms = {distance: score_form(model, site, number, distance) for distance in offsets}
        except UnsupportedModelError as error:
            forms = str(error)
        try:
            reason = not_moved(site, number, recorded(model, [site.layer], attention)[site.layer])
        except UnsupportedModelError as error:
            reason = str(error)
        return HeadCircuits(site.layer, number, number // site.group, fold_norm, maps, forms, reason)


def _maps(
    model: nn.Module, site: AttentionSite, head: int, layer: nn.Module, fold_norm: bool
) -> dict[Role, Affine | str]:
    flows = observed(model, layer.modules())
    norms = {role: norm_before(site, role, flows) if fold_norm else None for role in READ}
    if fold_norm and None in norms.values():
        raise UnsupportedModelError(
            f"fold_norm=True: no norm in layer {site.layer} makes what {site.name} reads; use fold_norm=False"
        )
    with undisturbed(model), unsharded(model, layer.modules()):
        maps = {role: _or_reason(partial(reading_map, site, head, role, flows, norms[role])) for role in READ}
        return maps | {"z": _or_reason(partial(writing_map, site, head, flows))}


def _or_reason(make: Callable[[], Affine]) -> Affine | str:
    try:
        return make()
    except UnsupportedModelError as error:
        return str(error)
