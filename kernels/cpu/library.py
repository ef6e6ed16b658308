"""The C interface of the kernels: its structs and functions, as `source/library.cpp` declares them."""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from functools import cache
from pathlib import Path

import numpy as np

from kernels.cpu.build import KernelsUnavailable, build


class PackedStruct(Structure):
    _fields_ = [("outputs", c_int32), ("inputs", c_int32), ("bits", c_int32), ("units", c_void_p)]


class LayerStruct(Structure):
    _fields_ = [
        ("attention_norm", c_void_p),
        ("qkv", PackedStruct),
        ("qkv_bias", c_void_p),
        ("qk_norm", c_void_p),
        ("attention_output", PackedStruct),
        ("mlp_norm", c_void_p),
        ("gate_up", PackedStruct),
        ("down", PackedStruct),
    ]


class PoolStruct(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("layers", c_int32),
        ("kv_heads", c_int32),
        ("block_size", c_int32),
        ("dim", c_int32),
        ("bits", c_int32),
    ]


class ModelStruct(Structure):
    _fields_ = [
        ("layers", c_int32),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate", c_int32),
        ("vocab", c_int32),
        ("window", c_int32),
        ("rms_norm_eps", c_float),
        ("frequencies", c_void_p),
        ("embedding", PackedStruct),
        ("layer", POINTER(LayerStruct)),
        ("final_norm", c_void_p),
        ("unembedding", PackedStruct),
        ("pool", PoolStruct),
    ]


# Structs of C as rows of numpy.
SEQUENCE = np.dtype([("first", "i4"), ("queries", "i4"), ("start", "i4"), ("table", "u8")], align=True)


DRAW = np.dtype(
    [
        ("seed", "i8"),
        ("choice", "i8"),
        ("index", "i8"),
        ("top_p", "f8"),
        ("min_p", "f8"),
        ("temperature", "f4"),
        ("top_k", "i4"),
    ],
    align=True,
)


class BatchStruct(Structure):
    _fields_ = [
        ("tokens", c_int32),
        ("sequences", c_int32),
        ("sampled", c_int32),
        ("ids", c_void_p),
        ("sequence", c_void_p),
        ("last_tokens", c_void_p),
        ("logits", c_void_p),
        ("all_kept", c_int32),
    ]


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "diptych_team_create": (c_void_p, [c_int32, c_void_p, c_int32, c_int32]),
    "diptych_team_destroy": (None, [c_void_p]),
    "diptych_linear": (None, [c_void_p, POINTER(PackedStruct), c_void_p, c_int32, c_void_p]),
    "diptych_attention": (
        None,
        [c_void_p, POINTER(PoolStruct), *[c_int32] * 3, c_void_p, c_int32, c_void_p, c_void_p],
    ),
    "diptych_kv_write": (
        None,
        [POINTER(PoolStruct), c_int32, c_void_p, c_void_p, c_int32, c_void_p, c_void_p],
    ),
    "diptych_sample": (None, [c_void_p, c_void_p, c_int32, c_int32, c_void_p, c_void_p]),
    "diptych_rms_norm": (None, [c_void_p, c_void_p, c_int32, c_int32, c_float, c_void_p]),
    "diptych_swiglu": (None, [c_void_p, c_int32, c_void_p]),
    "diptych_decoder_create": (c_void_p, [POINTER(ModelStruct), c_void_p]),
    "diptych_decoder_destroy": (None, [c_void_p]),
    "diptych_decoder_run": (None, [c_void_p, POINTER(BatchStruct)]),
    "diptych_decoder_unembed": (None, [c_void_p, c_void_p, c_int32, c_void_p]),
}


@cache
def load_library(folder: Path, level: str) -> ctypes.CDLL:
    """The library for a processor of `level`, built in `folder` at first. Raises KernelsUnavailable."""
    path = build(folder, level)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"{path} cannot be loaded ({error}). Delete it to build it again") from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
