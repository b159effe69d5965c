"""Bodies of uploads that mean harm, each with the code of its refusal: the worst that strangers send.

`python -m tests.kit.hostile` measures what each costs: CPU time and memory above what there was before.
"""

from __future__ import annotations

import gzip
import json
import pickle
import random
import stat
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from adapters_store.base.spec import BaseSpec, ItemBytes
from adapters_store.errors import ArtifactError
from adapters_store.format.archive import unpack_upload
from adapters_store.format.folder import CONFIG, MANIFEST, WEIGHTS, read_folder
from adapters_store.methods.compile import Room, compile_patch
from adapters_store.primitives import Patch
from tests.kit.forge import entry, raw, sound_members, tar_link, tar_of, toy_config, toy_spec, toy_tensors, zip_of
from tests.kit.watch import Touched, watched

MAX_BYTES = 64 * 2**20
MAX_CPU_SECONDS, MAX_MEMORY = 0.2, 32 * 2**20
SOUND = sound_members()
OUT_OF_THE_FOLDER = (
    "../evil",
    "/etc/evil",
    "a/../../evil",
    "..\\evil",
    "\\evil",
    "C:/evil",
    "C:evil",
    "a\\..\\..\\evil",
)
KNOWN_DTYPES = ("F32", "F16", "BF16")
OTHER_DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16"), 4),
    **dict.fromkeys(("I32", "U32"), 2),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 1),
    **dict.fromkeys(("F4", "F6_E2M3", "F6_E3M2"), 16),
}


def zipped(**parts: bytes) -> bytes:
    """A zip of a sound folder with other files: `config`, `weights`, `manifest`."""
    names = {"config": CONFIG, "weights": WEIGHTS, "manifest": MANIFEST}
    return zip_of({**SOUND, **{names[part]: data for part, data in parts.items()}})


def configs() -> dict[str, bytes]:
    """adapter_config.json as strangers write it."""
    sound = toy_config()
    changes: dict[str, dict[str, Any]] = {
        "auto_map": {"auto_map": {"AutoModel": "evil--modeling.Evil"}},
        "a parent library": {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}, "evil_key": 1},
        "a path as a key": {"../../etc/passwd": 1},
        "a path as the base": {"base_model_name_or_path": "../../../etc/passwd", "peft_type": "../../etc"},
        "a URL as the method": {"peft_type": "http://127.0.0.1:9/x"},
        "a URL as weights": {"lora_weights": "file:///etc/passwd"},
        "a regex in rank_pattern": {"rank_pattern": {"(.*)*" * 50: 3}},
        "a list of 30,000 names": {"target_modules": ["x"] * 30_000},
        "a rank that is negative": {"r": -1},
        "a rank of 2^63": {"r": 2**62},
        "a rank that is a list": {"r": [8]},
        "an alpha of 1e308": {"lora_alpha": 1e308},
        "init by code": {"init_lora_weights": "__import__('os').system('id')"},
        "a runtime": {"runtime_config": {"ephemeral_gpu_offload": True}, "evil": "x"},
        "a template": {"prompt": "{{ ''.__class__ }}"},
    }
    made = {name: json.dumps({**sound, **change}).encode() for name, change in changes.items()}
    made["an integer of 5,000 digits"] = json.dumps(sound).replace('"r": 2', '"r": ' + "9" * 5000).encode()
    made["depth of 100,000"] = b'{"peft_type":' * 1 + b"[" * 100_000
    made["depth of objects"] = b'{"a":' * 40_000
    made["NaN"] = json.dumps({**sound, "lora_alpha": float("nan")}).encode()
    made["1e999"] = json.dumps(sound).replace('"lora_alpha": 4', '"lora_alpha": 1e999').encode()
    made["a key twice"] = json.dumps(sound).replace("{", '{"r": 3, ', 1).encode()
    made["a lone surrogate"] = json.dumps({**sound, "revision": "\ud800"}).encode()
    made["UTF-16"] = json.dumps(sound).encode("utf-16")
    made["a byte order mark"] = b"\xef\xbb\xbf" + json.dumps(sound).encode()
    made["not an object"] = b"[]"
    made["1 MB of spaces"] = b" " * 2**20 + json.dumps(sound).encode()
    return made


HARMLESS = {  # data that is never run, read or fetched: the tensors alone say where they act
    "a regex that backtracks": {"target_modules": "(a+)+$" * 20 + "\\"},
    "a path as the base": {"base_model_name_or_path": "../../../etc/passwd"},
    "a URL as the base": {"base_model_name_or_path": "http://127.0.0.1:9/x", "revision": "file:///etc/passwd"},
}


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import os; os.mkdir('/tmp/manyhats-was-here')",))


def pickles() -> dict[str, bytes]:
    """A pickle in every disguise."""
    made: dict[str, bytes] = {}
    for protocol in range(6):
        data = pickle.dumps(Evil(), protocol=protocol)
        made[f"protocol {protocol} as weights"] = zipped(weights=data)
        made[f"protocol {protocol} as config"] = zipped(config=data)
        made[f"protocol {protocol} as a manifest"] = zipped(manifest=data)
        made[f"protocol {protocol} as the body"] = data
        made[f"protocol {protocol} as safetensors"] = data
    evil = pickle.dumps(Evil())
    torch_file = zip_of({"archive/data.pkl": evil, "archive/version": b"3"})
    made["torch's zip as the body"] = torch_file
    made["torch's zip as weights"] = zipped(weights=torch_file)
    for name in ("adapter_model.bin", "a.pt", "a.PTH", "a.pkl", "a.pickle", "sub/a.ckpt", "pytorch_adapter.bin"):
        made[name] = zip_of({CONFIG: SOUND[CONFIG], name: evil})
    return made


def zips() -> dict[str, bytes]:
    """Bombs, links and names that lead out."""

    def link(name: str, mode: int = stat.S_IFLNK) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(name)
        info.external_attr = (mode | 0o777) << 16
        return info

    bomb = {CONFIG: SOUND[CONFIG], WEIGHTS: bytes(MAX_BYTES - 10_000)}
    inner = zip_of(bomb, compress=True)
    made = {
        "a bomb": zip_of(bomb, compress=True),
        "a bomb in a bomb": zip_of({CONFIG: SOUND[CONFIG], WEIGHTS: inner}, compress=True),
        "a bomb as config": zip_of({**SOUND, CONFIG: b" " * 2**24}, compress=True),
        "more than is taken": zip_of({CONFIG: SOUND[CONFIG], WEIGHTS: bytes(MAX_BYTES)}, compress=True),
        "a link as weights": zip_of([(CONFIG, SOUND[CONFIG]), (link(WEIGHTS), b"/etc/passwd")]),
        "a link as config": zip_of([(WEIGHTS, SOUND[WEIGHTS]), (link(CONFIG), b"/etc/passwd")]),
        "a device": zip_of([(WEIGHTS, SOUND[WEIGHTS]), (link(CONFIG, stat.S_IFCHR), b"")]),
        "a fifo": zip_of([(WEIGHTS, SOUND[WEIGHTS]), (link(CONFIG, stat.S_IFIFO), b"")]),
        "30,000 members": zip_of({f"f{i}": b"" for i in range(30_000)}),
    }
    for name in OUT_OF_THE_FOLDER:
        made[f"the name {name}"] = zip_of({**SOUND, name: b"x"})
    return made


def tars() -> dict[str, bytes]:
    """The same in a gzipped tar, and headers that want memory or time."""
    sound = list(SOUND.items())
    large_header = tarfile.TarInfo(CONFIG)
    large_header.pax_headers = {"comment": "x" * 2**20}
    sparse = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n" + b"1\n" * 2**19
    negative = bytearray(tarfile.TarInfo(WEIGHTS).tobuf())
    negative[124:136] = b"\xff" * 12  # a size of -1, of which the sum must be right to be read
    negative[148:156] = b"%06o\0 " % (sum(negative) - sum(negative[148:156]) + 8 * 32)
    made = {
        "a bomb": tar_of({CONFIG: SOUND[CONFIG], WEIGHTS: bytes(MAX_BYTES - 10_000)}),
        "a bomb beside": tar_of({**SOUND, "optimizer.pt": bytes(MAX_BYTES)}),
        "zeros without end": gzip.compress(bytes(MAX_BYTES), 1),
        "no tar": gzip.compress(b"hello" * 1000),
        "cut": tar_of(SOUND)[:-200],
        "a wrong sum": tar_of(SOUND)[:-8] + bytes(8),
        "a link as weights": tar_of([sound[0], (tar_link(WEIGHTS), b"")]),
        "a hard link as weights": tar_of([sound[0], (tar_link(WEIGHTS, tarfile.LNKTYPE), b"")]),
        "a device as config": tar_of([sound[1], (tar_link(CONFIG, tarfile.CHRTYPE), b"")]),
        "a fifo as config": tar_of([sound[1], (tar_link(CONFIG, tarfile.FIFOTYPE), b"")]),
        "a header of 1 MB": tar_of([(large_header, SOUND[CONFIG])]),
        "a name of 1 MB": tar_of([("x/" * 2**19 + CONFIG, SOUND[CONFIG])], tarfile.GNU_FORMAT),
        "names of names": gzip.compress(tar_link("x", b"L").tobuf(tarfile.GNU_FORMAT) * 10_000),
        "a sparse map of 2^19": tar_of([(tar_link(WEIGHTS, tarfile.XHDTYPE), sparse), (CONFIG, b"{}")]),
        "a negative size": gzip.compress(bytes(negative) * 3),
        "2,000 members": tar_of({f"f{i}": b"" for i in range(2000)}),
        "a pickle": tar_of({CONFIG: SOUND[CONFIG], "adapter_model.bin": pickle.dumps(Evil())}),
        "a pickle as weights": tar_of({**SOUND, WEIGHTS: pickle.dumps(Evil())}),
    }
    for name in OUT_OF_THE_FOLDER:
        made[f"the name {name}"] = tar_of({**SOUND, name: b"x"})
    return made


def structures() -> dict[str, bytes]:
    """safetensors whose structure is hostile, and every dtype that is not taken."""
    from tests.adapters_store.format.test_safetensors_file import HOSTILE

    made = {name: data for name, (data, _, _) in HOSTILE.items()}
    for dtype, count in OTHER_DTYPES.items():
        made[f"every {dtype}"] = raw({"a": entry([count], 0, 8, dtype)}, bytes(8))
    return made


def hostile() -> Mapping[str, bytes]:
    """All of them by name."""
    made: dict[str, bytes] = {}
    for name, data in structures().items():
        made[f"weights: {name}"] = zipped(weights=data)
        made[f"one file: {name}"] = data
    made |= {f"config: {name}": zipped(config=data) for name, data in configs().items()}
    one = save(toy_tensors(), metadata={"adapter_config": "[" * 100_000})
    made["one file: a config of depth 100,000"] = one
    made |= {f"pickle: {name}": body for name, body in pickles().items()}
    made |= {f"zip: {name}": body for name, body in zips().items()}
    made |= {f"tar: {name}": body for name, body in tars().items()}
    return made


def take_in(body: bytes, room: Path, spec: BaseSpec | None = None) -> Patch:
    """All that an upload to a base (a toy) goes through but the engine, in an empty folder. Raises `ArtifactError`."""
    folder = room / "folder"
    folder.mkdir()
    (room / "body").write_bytes(body)
    unpack_upload(room / "body", folder, MAX_BYTES)
    return compile_patch(read_folder(folder), spec or toy_spec(), Room(2**28, ItemBytes(), 65504.0))


def refusal(body: bytes, root: Path, has_memory: bool = False) -> tuple[ArtifactError | None, Touched]:
    """Why a body is refused (None: it is not), and what that touched outside a folder of its own below `root`."""
    with tempfile.TemporaryDirectory(dir=root) as room, watched(has_memory) as touched:
        try:
            take_in(body, Path(room))
        except ArtifactError as error:
            return error, touched
    return None, touched


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A copy with one to four changes: bytes, a cut, a span twice, a span away, a number swapped for a nasty one."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randrange(len(out)), draw.choice((1, 2, 4, 8))
        match draw.randrange(6):
            case 0:
                out[at] ^= 1 << draw.randrange(8)
            case 1:
                out[at : at + size] = draw.randbytes(size)
            case 2:
                out[at:at] = out[at : at + size * 8]
            case 3:
                del out[at : at + size * 8]
            case 4:
                out[at : at + 4] = draw.choice(
                    (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", bytes(4))
                )
            case _:
                out = out[: max(9, at)]
        if len(out) < 9:
            return bytes(out)
    return bytes(out)


def main() -> int:
    """A line each, the dearest last."""
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        for name, body in hostile().items():
            seconds = min(refusal(body, Path(folder))[1].cpu_seconds for _ in range(3))
            error, touched = refusal(body, Path(folder), has_memory=True)
            bad = not error or touched.events or touched.outside(Path(folder))
            over = seconds > MAX_CPU_SECONDS or touched.peak_bytes > MAX_MEMORY
            costs.append((seconds, touched.peak_bytes, name, str(error)[:80], "BAD" if bad or over else ""))
    for seconds, peak, name, said, mark in sorted(costs):
        print(f"{1e3 * seconds:8.1f} ms {peak / 2**20:7.2f} MiB {mark:3} {name}: {said}")
    num_bad = sum(bool(cost[-1]) for cost in costs)
    print(f"{len(costs)} hostile bodies, {num_bad} bad")
    return num_bad > 0


if __name__ == "__main__":
    sys.exit(main())
