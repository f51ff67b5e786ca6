"""Reading and writing weights and training checkpoints; the only module that may unpickle.

Our weights are safetensors with a `WeightsInfo` in their metadata. A training checkpoint is a `torch.save` of plain
types. Foreign files (torch pickles, detectron-style numpy pickles) come in through allow-lists: reading a file never
runs code from it.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from onestage.errors import WeightsError, some
from onestage.files import write_atomically

FORMATS = {"training": "onestage-training-1", "crash": "onestage-crash-2"}
DECODE = "decode.safetensors"  # of an exported model
METADATA_KEY = "onestage"
SUM_KEY = "onestage-crc32"
FOLDER = 0x10  # attribute of an entry in an archive


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """What weights are: enough to rebuild their model and to say where they come from.

    Args:
        package: Import name of the paper package.
        variant: Name of the variant, "" for a config of one's own.
        config: `asdict` of the model's config.
        categories: (id, name) of each label 0..K-1, as in the data set.
        metrics: Name to number, with `source` saying who measured.
        recipe: How they were trained, one line.
        source: File or data set they come from.
        source_sha256: Hash of the file they were converted from, "" where there is none.
        licence: Licence of the weights, "" if unknown.
        steps: Optimiser steps they have seen.
    """

    package: str
    variant: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    categories: tuple[tuple[int, str], ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    recipe: str = ""
    source: str = ""
    source_sha256: str = ""
    licence: str = ""
    steps: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> WeightsInfo:
        values = json.loads(text)
        known = {entry.name for entry in fields(WeightsInfo)}
        values = {key: value for key, value in values.items() if key in known}
        values["categories"] = tuple((int(number), str(name)) for number, name in values.get("categories", ()))
        return WeightsInfo(**values)


def save_weights(path: str | Path, state: Mapping[str, Tensor], info: WeightsInfo) -> None:
    """Writes safetensors with `info` and a checksum in the metadata; an older file of that name stays until the new
    one is whole."""
    alone = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    text = info.to_json()
    metadata = {"format": "pt", METADATA_KEY: text, SUM_KEY: _checksum(alone, text)}
    write_atomically(path, safetensors.torch.save(alone, metadata))


def load_weights(path: str | Path, *, package: str | None = None) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Reads our weights, or the weights inside one of our training checkpoints (the averaged ones where it has them).

    Args:
        path: A .safetensors file that `save_weights` wrote, or a last.ckpt.
        package: Refuse weights of other packages than this one; also completes the commands in error texts.

    Raises:
        WeightsError: no such file, damaged, or not ours (a foreign checkpoint has to be converted first).
    """
    path = Path(path)
    kind = _sniff(path, package)
    if kind == "safetensors":
        state, metadata = _read_safetensors(path)
        if METADATA_KEY not in metadata:
            raise _foreign(path, package)
        text = metadata[METADATA_KEY]
        if metadata.get(SUM_KEY, "") not in ("", _checksum(state, text)):
            raise WeightsError(f"weights '{path}' are damaged: their checksum is another", "copy or train them again")
        info = WeightsInfo.from_json(text)
    else:
        _check_archive(path, kind)
        content = _read_content(path, kind)
        if not isinstance(content, dict) or content.get("format") != FORMATS["training"]:
            raise _foreign(path, package)
        state, info = content["ema"] or content["model"], WeightsInfo.from_json(content["info"])
    if package is not None and info.package != package:
        raise WeightsError(
            f"weights '{path}' belong to {info.package}, not to {package}",
            f"use them with {info.package}, or give weights that {package} trained or converted",
        )
    return state, info


def read_state_dict(path: str | Path, *, package: str | None = None) -> dict[str, Tensor]:
    """Reads the tensors of any weights file: safetensors, .pth/.pt, or a detectron-style .pkl of numpy arrays.

    Wrappers (`state_dict`, `model`, `blobs`) and a `module.` prefix that all names share are taken off; entries that
    are not tensors are left out.

    Args:
        path: The file.
        package: Completes the commands in error texts.

    Raises:
        WeightsError: no such file, damaged, not a weights file, or one that needs code to be read.
    """
    path = Path(path)
    kind = _sniff(path, package)
    content = _read_safetensors(path)[0] if kind == "safetensors" else _read_content(path, kind)
    for _ in range(2):  # {"model": {"state_dict": ...}} exists
        for wrapper in ("state_dict", "model", "blobs"):
            if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
                content = content[wrapper]
    state = {str(name): _as_tensor(value) for name, value in content.items()} if isinstance(content, dict) else {}
    tensors = {name: value for name, value in state.items() if value is not None}
    if not tensors:
        raise WeightsError(f"weights '{path}' hold no tensors", "give a file with a state dict")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    info: WeightsInfo,
    *,
    head: Literal["match", "reinit"] = "match",
    categories: Sequence[tuple[int, str]] | None = None,
    dataset: str = "",
) -> list[str]:
    """Copies weights into `model`, every tensor accounted for.

    Args:
        model: Built and initialised for the data set's number of classes.
        state: Tensors of the weights.
        info: Their info.
        head: "match" wants the same categories; "reinit" lets the layers that depend on the categories start anew. What
            a module without parameters holds was fitted to data and would not be learned again: it never does.
        categories: (id, name) of the data set the model is for; None: whatever the weights know.
        dataset: Its name in error texts.

    Returns:
        Names of the tensors that kept their initial values; empty with head "match".

    Raises:
        WeightsError: other categories, or tensors that do not fit.
    """
    own = model.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or surplus:
        parts = [f"lack {some(missing)}"] if missing else []
        parts += [f"hold {some(surplus)}, which it does not have"] if surplus else []
        raise WeightsError(
            f"weights do not fit the model: they {' and '.join(parts)}",
            f"use the variant they were made with ({info.variant or 'see their info'})",
        )
    names = None if categories is None else [name for _, name in categories]
    renamed = bool(names and info.categories) and names != [name for _, name in info.categories]
    if renamed and head == "match":
        raise _other_categories(info, names or [], dataset)
    restarted = [name for name, tensor in own.items() if tensor.shape != state[name].shape]
    if restarted and head == "match":
        name = restarted[0]
        raise WeightsError(
            f"weights do not fit the model: {name} is {list(state[name].shape)}, the model's {list(own[name].shape)}",
            f"use the variant they were made with ({info.variant or 'see their info'})",
        )
    misfits = [name for name in restarted if name.startswith("backbone.")]
    if misfits:
        raise WeightsError(
            f"weights have another backbone: {some(misfits)} differ in shape",
            f"use the variant they were made with ({info.variant or 'see their info'})",
        )
    fitted = [name for name in restarted if not _learns(model, name)]
    if fitted:
        raise WeightsError(
            f"weights have another shape of what was fitted and cannot start anew: {some(fitted)}",
            "keep the settings they were made with, or train from a trunk alone (--weights-backbone)",
        )
    if renamed and not restarted:  # as many categories, but others: shapes do not tell which layers know them
        restarted = [
            name
            for name, tensor in own.items()
            if not name.startswith("backbone.") and tensor.ndim > 0 and tensor.shape[0] == len(info.categories)
            if _learns(model, name)
        ]
    model.load_state_dict({name: own[name] if name in restarted else state[name] for name in own}, strict=True)
    return restarted


def save_checkpoint(path: str | Path, state: dict[str, Any], kind: Literal["training", "crash"] = "training") -> None:
    """Writes the state of a run atomically; the previous file stays until the new one has been read back.

    Args:
        path: Usually `last.ckpt`.
        state: Nested dict, list, tuple of str, int, float, bool, None and Tensor, nothing else: safe loading refuses
            the rest.
        kind: What `load_checkpoint` will be asked for.

    Raises:
        MachineError: no space.
    """
    _check_plain(state, "checkpoint")
    buffer = io.BytesIO()
    torch.save({"format": FORMATS[kind], **state}, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path: str | Path, kind: Literal["training", "crash"] = "training") -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; tensors arrive on the CPU.

    Raises:
        WeightsError: no such file, damaged, or something else; of a run's checkpoint it names the weights to go on
            with, if there are any.
    """
    path = Path(path)
    try:
        content_kind = _sniff(path, None)
        if content_kind == "safetensors":
            content = None
        else:
            _check_archive(path, content_kind)
            content = _read_content(path, content_kind)
    except WeightsError as error:
        raise WeightsError(error.what, _instead_of(path, kind)) from error
    if not isinstance(content, dict) or content.get("format") != FORMATS[kind]:
        raise WeightsError(
            f"'{path}' is not a {kind} checkpoint of this program",
            "give --resume the last.ckpt of a run; plain weights go to --weights"
            if kind == "training"
            else "give --replay a crash-<step>.pt of a run",
        )
    return content


def _learns(model: nn.Module, name: str) -> bool:
    """Whether the module that holds this tensor has parameters, as a norm with running statistics does."""
    return any(True for _ in model.get_submodule(name.rpartition(".")[0]).parameters())


def _sniff(path: Path, package: str | None) -> Literal["safetensors", "torch", "pickle"]:
    """What the first bytes say the file is."""
    if not path.exists():
        raise WeightsError(f"weights '{path}' do not exist", f"check the path{_beside(path)}")
    if (path / DECODE).is_file():
        raise WeightsError(
            f"weights '{path}' are an exported model, which predict and Predictor.from_export run",
            "give the weights that it was exported from",
        )
    if path.is_dir():
        raise WeightsError(f"weights '{path}' are a folder", f"name the file in it{_beside(path / 'x')}")
    foreign = package is not None and path.suffix not in (".safetensors", ".ckpt")  # ours are not converted
    convert = f", then: python -m {package}.convert --from {path} --to {path.stem}.safetensors" if foreign else ""
    again = f"download the file itself{convert}"
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(512)
    if size == 0:
        raise WeightsError(f"weights '{path}' are empty (0 bytes; a broken download or a full disk?)", again)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<!--")):
        raise WeightsError(
            f"weights '{path}' is an HTML page, not a checkpoint (a login or quota page saved by a browser or wget?)",
            again,
        )
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"weights '{path}' is a git-lfs pointer, not the file it stands for", "run: git lfs pull")
    if head.startswith(b"PK\x03\x04"):
        try:
            if not zipfile.is_zipfile(path):  # its directory stands at the end
                raise _cut_short(path, size, again)
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
            raise WeightsError(f"weights '{path}' are damaged or cut short ({error})", again) from error
        if unpacked > (1 << 20) + 20 * size:  # torch does not compress, and weights hardly shrink
            what = f"weights '{path}' unpack from {size:,} to {unpacked:,} bytes, which no weights do"
            raise WeightsError(what, again)
        return "torch"
    if head.startswith(_LEGACY_TORCH):
        return "torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _LONGEST_SAFETENSORS_HEADER:
        _check_safetensors_size(path, size, again)
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    if path.suffix == ".safetensors":
        raise _cut_short(path, size, again)
    kind = next((name for start, name in _OTHER_KINDS if head.startswith(start)), "not in a format weights come in")
    raise WeightsError(
        f"weights '{path}' are {kind} (first bytes {head[:8]!r})", "give a .safetensors, .pth, .pt or .pkl file"
    )


_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6, torchvision's older files
_LONGEST_SAFETENSORS_HEADER = 100_000_000  # the format's own limit; a pickle's first 8 bytes are a larger number
_OTHER_KINDS = (
    (b"\x1f\x8b", "a gzip archive (unpack it first)"),
    (b"BZh", "a bzip2 archive (unpack it first)"),
    (b"\xfd7zXZ", "an xz archive (unpack it first)"),
    (b"\x93NUMPY", "one numpy array"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8", "a JPEG image"),
    (b"\x89HDF", "an HDF5 file of another framework"),
    (b"{", "JSON text"),
    (b"[", "JSON text"),
)


def _check_safetensors_size(path: Path, size: int, again: str) -> None:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if 8 + length > size:
            raise _cut_short(path, size, again)
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            promised = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise WeightsError(f"weights '{path}' have a damaged safetensors header", again) from error
    if promised > size:
        raise _cut_short(path, size, again, promised)


def _checksum(state: Mapping[str, Tensor], text: str) -> str:
    """CRC-32 of tensors, whatever their order, and of a text; safetensors itself notices no flipped bit."""
    found = zlib.crc32(text.encode())
    for name in sorted(state):
        tensor = state[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def _check_archive(path: Path, kind: str) -> None:
    """Compares the parts of a torch file with the checksums it was saved with, at which torch itself does not look."""
    if kind != "torch" or not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            # torch packs nothing, and takes numbers that are marked as a folder for anything that is in memory.
            entries = archive.infolist()
            odd = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED or e.external_attr & FOLDER]
            damaged = odd[0] if odd else archive.testzip()
    except UNPICKLING_ERRORS + (OSError, NotImplementedError, zlib.error) as error:
        raise WeightsError(f"weights '{path}' are damaged ({error})", "copy or save the file again") from error
    if damaged is not None:
        raise WeightsError(
            f"weights '{path}' are damaged: the checksum of {damaged} is another", "copy or save the file again"
        )


def _instead_of(path: Path, kind: str) -> str:
    """What to do without a checkpoint of a run."""
    if kind == "crash":
        return "give --replay another crash-<step>.pt, or resume the run to meet the batch again"
    best = path.with_name("best.safetensors")
    try:
        _, info = load_weights(best)
    except WeightsError:
        return "give --resume another checkpoint, or start again without it"
    return f"train from the best weights of that run, those after step {info.steps}: --weights {best}"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise WeightsError(f"weights '{path}' are damaged ({error})", "download or save the file again") from error


def _read_content(path: Path, kind: Literal["torch", "pickle"]) -> Any:
    """Unpickles through the allow-lists."""
    try:
        if kind == "torch":
            with torch.serialization.safe_globals(_numpy_globals()):
                return torch.load(path, map_location="cpu", weights_only=True)
        with open(path, "rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except UNPICKLING_ERRORS as error:
        first = str(error).partition("\n")[0]
        if "Unsupported global" in str(error) or "GLOBAL" in str(error) or isinstance(error, _Refused):
            raise WeightsError(
                f"weights '{path}' hold Python objects besides tensors, which could run code ({_blamed(str(error))})",
                "where you trust the file, save its state dict alone: torch.save(model.state_dict(), ...)",
            ) from error
        raise WeightsError(f"weights '{path}' are damaged or cut short ({first})", "download the file again") from error


class _Refused(pickle.UnpicklingError):
    """A class or function that is not on the allow-list."""


# What reading a damaged or foreign pickle may raise.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ImportError,
    OverflowError,
    MemoryError,
    struct.error,
    AssertionError,
    zipfile.BadZipFile,
)


class _ArrayUnpickler(pickle.Unpickler):
    """Knows numpy arrays, scalars and ordered dicts besides what pickle itself builds; refuses the rest."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("collections", "OrderedDict"), ("_codecs", "encode")):
            return {"OrderedDict": OrderedDict, "encode": _encode}[name]
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            known = {"_reconstruct": _empty_array, "scalar": _scalar, "ndarray": np.ndarray, "dtype": np.dtype}
            if name in known:
                return known[name]
        raise _Refused(f"GLOBAL {module}.{name}")


def _numpy_globals() -> list[Any]:
    """The same allow-list in the form torch takes."""
    multiarray = [f"numpy.{core}.multiarray" for core in ("core", "_core")]
    kinds = "?bBhHiIlLqQefdSU"
    return [
        np.ndarray,
        np.dtype,
        *{type(np.dtype(kind)) for kind in kinds},
        *((_empty_array, f"{module}._reconstruct") for module in multiarray),
        *((_scalar, f"{module}.scalar") for module in multiarray),
    ]


def _empty_array(subtype: type, shape: tuple[int, ...], kind: bytes) -> np.ndarray:
    """numpy's `_reconstruct` for the only arguments its own pickles have; the state that follows brings the data."""
    if subtype is not np.ndarray or tuple(shape) != (0,):
        raise _Refused("GLOBAL numpy array of unusual make")
    return np.ndarray((0,), np.int8)


def _scalar(dtype: np.dtype, data: bytes | str) -> Any:
    if dtype.hasobject:
        raise _Refused("GLOBAL numpy scalar of Python objects")
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype, 1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Refused(f"GLOBAL encoding {encoding}")
    return text.encode("latin1")


def _blamed(message: str) -> str:
    """The name of the refused class in torch's or our message."""
    _, _, rest = message.partition("GLOBAL ")
    return rest.split(" was not")[0].strip().split("\n")[0] or "see -v"


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.isnative:
        return torch.from_numpy(value.copy())
    return None


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            assert type(key) in (str, int), f"{where}: key {key!r}"
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif not isinstance(value, Tensor):
        assert value is None or type(value) in (str, int, float, bool), f"{where} is a {type(value).__name__}"


def _foreign(path: Path, package: str | None) -> WeightsError:
    command = (
        f"python -m {package}.convert --from {path} --to {path.stem}.safetensors" if package else "the convert verb"
    )
    return WeightsError(
        f"weights '{path}' were not written by this program: they do not say which model they are",
        f"if they are an official checkpoint, convert it: {command}",
    )


def _other_categories(info: WeightsInfo, names: list[str], dataset: str) -> WeightsError:
    fix = "add --head reinit to keep the trunk and start a new head"
    if len(names) != len(info.categories):
        what = f"weights know {len(info.categories)} categories, dataset '{dataset}' has {len(names)} ({some(names)})"
        return WeightsError(what, fix)
    pairs = [f"{old} / {new}" for (_, old), new in zip(info.categories, names, strict=True) if old != new]
    return WeightsError(f"weights know other categories than dataset '{dataset}': {some(pairs)}", fix)


def _cut_short(path: Path, size: int, again: str, promised: int | None = None) -> WeightsError:
    expected = f" of {promised:,} bytes" if promised else " bytes"
    return WeightsError(f"weights '{path}' are cut short ({size:,}{expected}; a broken download?)", again)


def _beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder '{path.parent}'"
    found = sorted(
        p.name for p in path.parent.iterdir() if p.suffix in (".safetensors", ".pth", ".pt", ".pkl", ".ckpt")
    )
    return f"; beside it: {some(found)}" if found else ""
