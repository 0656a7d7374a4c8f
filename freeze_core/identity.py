"""Which model this is: a checksum of all its weights, the same wherever they lie and however they are sharded.

The checksum of a weight is `sum(bits[i, j, ...] * a[i] * b[j] * ...) mod 2**64`: the raw bits of each element, read as
an integer, times fixed pseudo-random coefficients of its index in the whole weight. Integer sums are exact and do not
depend on the order of their terms, so that each shard adds its own terms on its own device. Two weights that differ in
any bit have, but for a chance of about 1 in 2**32 at worst, different checksums; heads that changed places have, too.

All weights are read once, as in a pass over one token. Where the same tensor is looked at again its checksum is
remembered, if torch has counted no write to it and a sample of its elements, with one of each row and column at least,
is the same. Torch does not count writes through `.data` or numpy: after a first look in the same process, such a write
to a few elements, or to a part of one row or column, can be missed. Write to the parameter itself, under
`torch.no_grad()`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from freeze_core.errors import InterventionError

if TYPE_CHECKING:
    from freeze_core.attention.layout import Sites

__all__ = ["checksums", "is_same_model", "model_identity"]

PREFIX = "weights:"
"""What an identity starts with; one of earlier versions was 16 hexadecimal digits alone."""

CHUNK = 2**16
"""Elements that a CPU thread multiplies at once: their products stay in its cache."""

CHUNK_ON_DEVICES = 2**26

SMALL = 2**12
"""A tensor of so many elements is read as a whole each time."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
"""What the bits of an element are read as, by its size in bytes."""

_IDENTITIES: WeakKeyDictionary[Sites, str] = WeakKeyDictionary()
"""Of one call each: `find_sites` makes new sites every time."""

_CHECKSUMS: Any = WeakTensorKeyDictionary()
"""By tensor what it was when it was read last, and its checksum. Torch leaves open what its dictionary holds."""


def model_identity(sites: Sites) -> str:
    """A hash of all weights of the model that `sites` are in.

    It is a chain: the hash of the stack of layers, then that of each module around it up to the model itself, as far as
    that has further weights. A model that is entered by its base model has the first part of the whole model's chain.

    Weights are parameters and persistent buffers, in their order and in the dtype and storage that they are in; the
    class of each attention counts, too. Another dtype, quantisation, or a fused storage is another model: its
    activations differ, by rounding at least. Adapters of PEFT count if they are in effect: a disabled or inactive one
    leaves the identity alone, a merged one is part of the weight. Names, devices, offloading, `requires_grad` and
    training mode do not count.

    Raises:
        InterventionError: a weight has no values.
    """
    if sites not in _IDENTITIES:
        spans: dict[nn.Module, tuple[int, int]] = {}
        found = checksums(sites.model, spans)
        parts = sites.stack_name.split(".") if sites.stack_name else []
        around = [sites.model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]
        # fully_shard makes a subclass of each module that it is called with.
        classes = [type(site.attention).__name__.removeprefix("FSDP") for _, site in sorted(sites.by_layer.items())]
        hashes = [_short_hash([*classes, *found[slice(*spans[module])]]) for module in around]
        chain = [one for number, one in enumerate(hashes) if one not in hashes[:number]]
        _IDENTITIES[sites] = PREFIX + "/".join(chain)
    return _IDENTITIES[sites]


def is_same_model(identity: str, sites: Sites, what: str) -> bool:
    """Whether the model that `sites` are in has this `identity`, entered by another module maybe.

    An identity of an earlier version is compared as that version did, with a `UserWarning` that says how little it
    tells.

    Args:
        what: has the identity, for the warning.
    """
    if not identity.startswith(PREFIX):
        if identity != _identity_of_earlier_versions(sites):
            return False
        warnings.warn(
            f"{what} was saved by an earlier version, which noted the first and last four values of each attention "
            "weight alone: these are the same in this model, and nothing else could be compared; make and save it anew",
            UserWarning,
            stacklevel=2,
        )
        return True
    chains = [one.removeprefix(PREFIX).split("/") for one in (identity, model_identity(sites))]
    return all(one == other for one, other in zip(*chains, strict=False))


def _short_hash(texts: Collection[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


@torch.no_grad()
def checksums(model: nn.Module, spans: dict[nn.Module, tuple[int, int]] | None = None) -> list[str]:
    """The shape, dtype and checksum of each weight of `model`, in order.

    Args:
        spans: takes in the range of the list that is each module's.

    Raises:
        InterventionError: a weight has no values.
    """
    found: list[str] = []
    _walk(model, "", (), (), found, {} if spans is None else spans)
    return found


Offloaded = tuple[tuple[str, Mapping[str, Tensor]], ...]
"""Where accelerate has put the weights of the modules around: the path of each of these, and its weights by name."""


def _walk(
    module: nn.Module,
    path: str,
    around: Offloaded,
    idle: Collection[str],
    found: list[str],
    spans: dict[nn.Module, tuple[int, int]],
) -> None:
    start = len(found)
    around = (*around, *((path, weights) for weights in _offloaded(module)))
    in_effect, idle_adapters = _adapters(module)
    with _gathered(module):
        for name, tensor in _own(module):
            if name not in idle:
                checksum = _checksum(_present(tensor, f"{path}{name}", around)) % 2**64
                found.append(f"{tensor.dtype} {list(tensor.shape)} {checksum:x}")
        found += in_effect
        for name, child in module._modules.items():
            if child is not None and name not in idle:
                holds_adapters = name in getattr(module, "adapter_layer_names", ())
                _walk(child, f"{path}{name}.", around, idle_adapters if holds_adapters else (), found, spans)
    spans[module] = start, len(found)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _offloaded(module: nn.Module) -> list[Mapping[str, Tensor]]:
    """The weights that accelerate's hooks have taken out of a module, by their path in it."""
    hook = getattr(module, "_hf_hook", None)
    weights = [getattr(one, "weights_map", None) for one in getattr(hook, "hooks", [hook])]
    return [one for one in weights if one is not None]


def _present(tensor: Tensor, name: str, around: Offloaded) -> Tensor:
    """The values of a weight, from where they were offloaded to if they are not here."""
    if not tensor.is_meta:
        return tensor
    for path, weights in reversed(around):
        try:
            return weights[name.removeprefix(path)].to(tensor.dtype)
        except KeyError:
            continue
    raise InterventionError(
        f"the weight {name} is on the meta device, without values, so that it is unknown which model this is: load the "
        "weights first"
    )


def _adapters(module: nn.Module) -> tuple[list[str], list[str]]:
    """The scales of a layer's PEFT adapters that are in effect, and the names of those that are not."""
    if not hasattr(module, "adapter_layer_names"):
        return [], []
    layer: Any = module
    merged = getattr(layer, "merged_adapters", ())  # part of the weight
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name not in merged]
    containers: list[Any] = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    names = {name for one in containers if hasattr(one, "keys") for name in one.keys()}  # noqa: SIM118 - a module
    scales = getattr(layer, "scaling", None)
    in_effect = [f"scale {scales[name]}" for name in active if isinstance(scales, Mapping) and name in scales]
    return in_effect, sorted(names - set(active))


def _gathered(module: nn.Module) -> AbstractContextManager[object]:
    """Where FSDP's first version flattens and shards the weights of a module, a context in which they are whole."""
    wrapper: Any = type(module)
    if wrapper.__name__ != "FullyShardedDataParallel":
        return nullcontext()
    context: AbstractContextManager[object] = wrapper.summon_full_params(module, recurse=False, writeback=False)
    return context


def _checksum(tensor: Tensor) -> int:
    """The checksum of a weight, whose shards may be in several processes."""
    if hasattr(tensor, "device_mesh"):
        return _sharded(tensor)
    if hasattr(tensor, "__tensor_flatten__"):  # quantised, say: its parts are what is stored
        parts = [_checksum(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
        return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:16], 16)
    return _of_shard(tensor, [_coefficients(dim, size, tensor.device) for dim, size in enumerate(tensor.shape)], "")


def _sharded(tensor: Any) -> int:
    """The checksum of a DTensor: each process adds that of its shard, replicas count once."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    if not all(type(placement) in (Shard, Replicate) for placement in placements):
        return _checksum(tensor.full_tensor())  # FSDP over tensor parallelism interleaves its shards
    local = tensor.to_local()
    coefficients = [_coefficients(dim, size, local.device) for dim, size in enumerate(tensor.shape)]
    for number, placement in enumerate(placements):
        if isinstance(placement, Shard):
            shards = coefficients[placement.dim].chunk(mesh.size(number))
            rank = mesh.get_local_rank(number)
            coefficients[placement.dim] = shards[rank] if rank < len(shards) else shards[0][:0]
    own = torch.tensor(_of_shard(local, coefficients, f"{placements} {mesh.get_coordinate()}"), device=local.device)
    shares = [Partial() if isinstance(placement, Shard) else Replicate() for placement in placements]
    return int(DTensor.from_local(own, mesh, shares, run_check=False).full_tensor())


def _of_shard(tensor: Tensor, coefficients: list[Tensor], shard: str) -> int:
    """The checksum of what is here of a weight, as a signed integer of 64 bits.

    Args:
        coefficients: of each dimension.
        shard: which part of the weight it is, to be remembered by.
    """
    if tensor.numel() == 0:
        return 0
    bits = tensor.view(INTEGERS[tensor.element_size()])
    if bits.shape != tensor.shape:  # complex numbers of 16 bytes: each is two integers
        coefficients = [*coefficients[:-1], coefficients[-1].repeat_interleave(2) + torch.arange(2).repeat(2)]
    if tensor.numel() <= SMALL or tensor.dim() < 2 or tensor.is_inference() or not tensor.is_contiguous():
        return int(_contracted(bits, coefficients))
    sample = bits.flatten()[_sampled(bits.flatten(0, -2).shape[0], bits.shape[-1], bits.device)]
    state = (
        tensor._version,
        tensor.data_ptr(),
        tensor.shape,
        shard,
        int(_contracted(sample, [_coefficients(0, len(sample), sample.device)])),
    )
    before, checksum = _CHECKSUMS.get(tensor, (None, 0))
    if before != state:
        checksum = int(_contracted(bits, coefficients))
        _CHECKSUMS[tensor] = state, checksum
    return int(checksum)


def _contracted(bits: Tensor, coefficients: list[Tensor]) -> Tensor:
    """The sum of all elements, each times the coefficients of its index in each dimension."""
    most = CHUNK * torch.get_num_threads() if bits.device.type == "cpu" else CHUNK_ON_DEVICES
    values = bits
    for coefficient in reversed(coefficients):
        rows = values.reshape(-1, len(coefficient)).split(max(1, most // len(coefficient)))
        values = torch.cat([(part * coefficient).sum(-1) for part in rows]).view(values.shape[:-1])
    return values.long()


@lru_cache(maxsize=256)
def _coefficients(dim: int, size: int, device: torch.device) -> Tensor:
    """Odd pseudo-random numbers of 64 bits, one for each index of a dimension: SplitMix64 (Steele et al., 2014)."""
    x = torch.arange(1, size + 1, dtype=torch.int64, device="cpu") * -0x61C8864680B583EB + (dim << 56)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift)) * factor
    return ((x ^ (x >> 31)) | 1).to(device)


@lru_cache(maxsize=64)
def _sampled(rows: int, columns: int, device: torch.device) -> Tensor:
    """Indices in a flat matrix of one element at least of each row and column."""
    row, column = (torch.arange(size, dtype=torch.int64, device="cpu") for size in (rows, columns))
    return torch.cat([row * columns + row * 7919 % columns, column * 7919 % rows * columns + column]).to(device)


def _identity_of_earlier_versions(sites: Sites) -> str:
    """What versions without `PREFIX` noted: attention's names, shapes, and first and last values of each weight."""
    digest = hashlib.sha256()
    for layer, site in sorted(sites.by_layer.items()):
        digest.update(f"{layer} {type(site.attention).__name__}".encode())
        seen = set[int]()
        for path, module in site.attention.named_modules():
            around: Offloaded = tuple(("", weights) for weights in _offloaded(module))
            for name, parameter in module._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                digest.update(f"{path}{'.' if path else ''}{name} {list(parameter.shape)}".encode())
                values: Any = _present(parameter, name, around).detach()
                values = (values.full_tensor() if hasattr(values, "device_mesh") else values).flatten()
                digest.update(torch.cat([values[:4], values[-4:]]).to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]
