"""Loads a folder as published on Hugging Face (config.json, *.safetensors), or a GGUF file, into sharded parameters.

Owns the reading of safetensors. Never holds more on the host than one shard of one parameter: files are mapped, each
distinct shard is cut out of the map, dequantised, put on every device that holds it, and dropped.

    file:  | header length, u64 | header, JSON: name -> dtype, shape, [start, stop) | data                |
    param: axes "ldhc" <- tensors "model.layers.{l}.self_attn.q_proj.weight", stored as "hc,d"

A family says in `checkpoint` where each parameter lies; this file knows nothing else of any model.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models import decoder, mxfp4
from models.families import FAMILIES
from models.gguf_file import GgufFile, opened
from models.layer_plan import LayerPlan
from models.stored import stored_of

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
INTEGERS: dict[str, np.dtype] = {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
PACKED: dict[str, np.dtype] = {"U8": np.dtype(np.uint8)}
Bounds = tuple[tuple[int, int], ...]  # [start, stop) of each axis


def load_model(source: Path | GgufFile, mesh: Mesh, dtype: DTypeLike) -> tuple[decoder.DecoderConfig, dict[str, Any]]:
    """The family's configuration, and its parameters as `param_targets` wants them on `mesh`.

    source: a folder with config.json and *.safetensors, or a file *.gguf, opened or not

    Errors: ValueError names what is missing, misshapen, truncated or of an unknown dtype, before anything is read.
    """
    source = opened(source)
    tensors = source if isinstance(source, GgufFile) else Checkpoint(source)
    if (family := FAMILIES.get(tensors.hf["model_type"])) is None:
        raise ValueError(f"{source}: model_type {tensors.hf['model_type']!r} is none of {sorted(FAMILIES)}")
    cfg = family.from_hf(tensors.hf)
    stored, plan = cfg.checkpoint(), LayerPlan(cfg)

    def param(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Param:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        there = stored_of(stored, name)
        sizes = dict(zip(there.axes, leaf.shape, strict=True))
        layers = plan.layers_of(name.split(".")[1]) if "l" in there.axes else ()
        add = there.add if tensors.adds else 0.0
        dtypes = INTEGERS if np.issubdtype(leaf.dtype, np.integer) else DTYPES
        return Param(there.name, tuple(there.stored.split(",")), there.axes, sizes, layers, add, there.part, dtypes)

    params = jax.tree_util.tree_map_with_path(param, decoder.abstract_params(cfg))
    jax.tree.map(tensors.check, params)
    targets = decoder.param_targets(cfg, mesh, dtype)
    return cfg, jax.tree.map(lambda param, target: _load_param(tensors, param, target), params, targets)


def weights_version(path: Path) -> str:
    """Changes when the files of a model do: other weights must never get its pages."""
    files = [path] if path.is_file() else sorted([*path.glob("*.json"), *path.glob("*.safetensors")])
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


@dataclass(frozen=True)
class Param:
    """Where a parameter lies in a checkpoint.

    name:   of its tensors, with a field for each axis that is spread over them
    groups: for each stored dimension the parameter's axes that it joins
    axes:   of the parameter
    sizes:  of each axis, as published
    layers: which layer each entry of axis l is; -1: padding
    add:    to each entry
    part:   see `Stored`
    dtypes: that its tensors may have
    """

    name: str
    groups: tuple[str, ...]
    axes: str
    sizes: dict[str, int]
    layers: tuple[int, ...]
    add: float
    part: tuple[int, int] | None
    dtypes: Mapping[str, np.dtype]

    @property
    def spread(self) -> str:
        return "".join(axis for axis in self.axes if axis not in "".join(self.groups))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        first, *others = (math.prod(self.sizes[axis] for axis in group) for group in self.groups)
        return (self.part[1] if self.part else first, *others)

    def names(self) -> Iterator[str]:
        numbers = {axis: range(self.sizes[axis]) for axis in self.spread}
        numbers |= {"l": [layer for layer in self.layers if layer >= 0]} if "l" in numbers else {}
        for chosen in itertools.product(*numbers.values()):
            yield self.name.format(**dict(zip(numbers, chosen, strict=True)))


def _load_param(tensors: Checkpoint | GgufFile, param: Param, target: jax.ShapeDtypeStruct) -> jax.Array:
    """Reads each distinct shard once, however many devices hold it."""
    holders: dict[Bounds, list[Any]] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index or (), target.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        shard = _read_shard(tensors, param, bounds, target)
        shards += [jax.device_put(shard, device) for device in devices]
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)


def _read_shard(
    tensors: Checkpoint | GgufFile, param: Param, bounds: Bounds, target: jax.ShapeDtypeStruct
) -> np.ndarray:
    """The entries [start, stop) of each axis. The layer axis is padded with zeros, others are repeated."""
    shard = np.zeros([stop - start for start, stop in bounds], target.dtype)
    picks: dict[str, np.ndarray] = {}
    for axis, (start, stop), padded in zip(param.axes, bounds, target.shape, strict=True):
        wanted = np.arange(start, stop)
        picks[axis] = wanted * param.sizes[axis] // padded
        if axis == "l":
            picks[axis] = np.pad(param.layers, (0, padded - len(param.layers)), constant_values=-1)[wanted]
    stored = "".join(param.groups)
    order = [stored.index(axis) for axis in param.axes if axis in stored]
    for places in itertools.product(*(range(len(picks[axis])) for axis in param.spread)):
        place = dict(zip(param.spread, places, strict=True))
        if "l" in place and picks["l"][place["l"]] < 0:
            continue
        name = param.name.format(**{axis: picks[axis][i] for axis, i in place.items()})
        first, *others = (_join(group, picks, param.sizes) for group in param.groups)
        values = tensors.read(name, (first + (param.part[0] if param.part else 0), *others))
        values = values.reshape([len(picks[axis]) for axis in stored]).transpose(order)
        values = values + np.float32(param.add) if param.add else values
        shard[tuple(place.get(axis, slice(None)) for axis in param.axes)] = values
    return shard


def _join(group: str, picks: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
    """Entries of a stored dimension that joins several axes: "hc" -> h * sizes["c"] + c."""
    joined = np.zeros(1, np.int64)
    for axis in group:
        joined = (joined[:, None] * sizes[axis] + picks[axis][None]).reshape(-1)
    return joined


class Checkpoint:
    """The tensors of a folder, mapped.

    hf:           what config.json says
    weight_block: how many rows and columns share one scale of an fp8 weight
    """

    adds = True  # what `Stored.add` says

    def __init__(self, folder: Path):
        self.folder = folder
        self.hf = json.loads((folder / "config.json").read_text())
        self.weight_block = _scale_block(self.hf)
        self._tensors: dict[str, _Tensor] = {}
        for path in _files(folder):
            for name, tensor in _map_file(path).items():
                if name in self._tensors:
                    raise ValueError(f"{path}: tensor {name!r} is in another file too")
                self._tensors[name] = tensor

    def check(self, param: Param) -> None:
        for name in param.names():
            if name not in self._tensors and name + mxfp4.BLOCKS in self._tensors:
                self._check_packed(name, param.stored_shape)
                continue
            self._check_tensor(name, param.stored_shape, param.dtypes)
            if self._tensors[name].is_fp8:
                grid = tuple(-(-n // block) for n, block in zip(param.stored_shape, self.weight_block, strict=True))
                self._check_tensor(name + "_scale_inv", grid)

    def _check_packed(self, name: str, shape: tuple[int, ...]) -> None:
        try:
            shapes = mxfp4.packed_shapes(shape)
        except ValueError as error:
            raise ValueError(f"{self.folder}: tensor {name + mxfp4.BLOCKS!r}: {error}") from None
        for ending, packed in shapes.items():
            self._check_tensor(name + ending, packed, PACKED)

    def _check_tensor(self, name: str, shape: tuple[int, ...], dtypes: Mapping[str, np.dtype] = DTYPES) -> None:
        if name not in self._tensors:
            raise ValueError(f"{self.folder}: no tensor {name!r}")
        tensor = self._tensors[name]
        if tensor.dtype not in dtypes:
            raise ValueError(f"{self.folder}: tensor {name!r} has dtype {tensor.dtype}, none of {sorted(dtypes)}")
        if tensor.shape != shape:
            raise ValueError(f"{self.folder}: tensor {name!r} has shape {tensor.shape}, not {shape}")
        wanted = math.prod(shape) * dtypes[tensor.dtype].itemsize
        if tensor.data.nbytes != wanted:
            raise ValueError(f"{self.folder}: tensor {name!r} has {tensor.data.nbytes} bytes, not {wanted}")

    def read(self, name: str, picks: tuple[np.ndarray, ...]) -> np.ndarray:
        """The picked entries of each dimension; fp8 weights times their block's scale, and MXFP4, in fp32."""
        if name not in self._tensors:
            blocks, scales = (self._tensors[name + ending].array for ending in (mxfp4.BLOCKS, mxfp4.SCALES))
            return mxfp4.read(blocks, scales, picks)
        values = _take(self._tensors[name].array, picks)
        if not self._tensors[name].is_fp8:
            return values
        blocks = tuple(pick // block for pick, block in zip(picks, self.weight_block, strict=True))
        scale = _take(self._tensors[name + "_scale_inv"].array, blocks)
        return values.astype(np.float32) * scale.astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Tensor:
    """One entry of a file's header; data: uint8[nbytes], a view of the map."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def array(self) -> np.ndarray:
        return self.data.view((DTYPES | INTEGERS | PACKED)[self.dtype]).reshape(self.shape)

    @property
    def is_fp8(self) -> bool:
        return self.dtype.startswith("F8")


def _take(array: np.ndarray, picks: tuple[np.ndarray, ...]) -> np.ndarray:
    """`array[np.ix_(*picks)]`, as a view wherever the picks are consecutive."""
    for axis, pick in enumerate(picks):
        part = slice(pick[0], pick[-1] + 1) if np.all(np.diff(pick) == 1) else pick
        array = array[(slice(None),) * axis + (part,)]
    return array


def _files(folder: Path) -> list[Path]:
    """The safetensors files: those of the index where there is one."""
    index, paths = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    if index.exists():
        paths = [folder / Path(name).name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if missing := [path.name for path in paths if not path.exists()] or ([] if paths else ["*.safetensors"]):
        raise ValueError(f"{folder}: missing files {missing}")
    return paths


def _map_file(path: Path) -> dict[str, _Tensor]:
    """Maps a file and reads its header; offsets are checked against the file, not yet against shapes."""
    if (file_bytes := path.stat().st_size) < 8:
        raise ValueError(f"{path}: {file_bytes} bytes are no safetensors file")
    with path.open("rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    header_stop = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if header_stop > file_bytes:
        raise ValueError(f"{path}: truncated: the header ends at byte {header_stop}, the file at {file_bytes}")
    try:
        header = json.loads(data[8:header_stop].tobytes())
    except ValueError as error:
        raise ValueError(f"{path}: the header is no JSON: {error}") from error
    tensors = {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, stop = (header_stop + offset for offset in entry["data_offsets"])
        if not header_stop <= start <= stop <= file_bytes:
            raise ValueError(f"{path}: truncated: tensor {name!r} is at [{start}, {stop}) of {file_bytes} bytes")
        tensors[name] = _Tensor(entry["dtype"], tuple(entry["shape"]), data[start:stop])
    return tensors


def _scale_block(hf: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of an fp8 weight that share one scale."""
    quantization = hf.get("quantization_config")
    if quantization is None or quantization.get("quant_method") == "mxfp4":
        return 128, 128
    if quantization.get("quant_method") != "fp8" or quantization.get("weight_block_size") is None:
        raise ValueError(f"quantization_config must be fp8 with a weight_block_size, or mxfp4, not {quantization}")
    return tuple(quantization["weight_block_size"])
