import collections
import io
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from onestage.engine import checkpoint
from onestage.engine.checkpoint import (
    WeightsInfo,
    load_checkpoint,
    load_into,
    load_weights,
    read_state_dict,
    save_checkpoint,
    save_weights,
)
from onestage.errors import WeightsError

INFO = WeightsInfo(
    package="paper",
    variant="small",
    config={"num_classes": 2, "grid": [2, 2]},
    categories=((7, "cat"), (9, "d'og")),
    metrics={"segm/AP": 0.25},
    steps=10,
)


class Detector(nn.Module):
    def __init__(self, num_classes=2, width=4):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
        self.classify = nn.Conv2d(width, num_classes, 1)


def test_weights_and_info_survive_the_file(tmp_path):
    state = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    save_weights(tmp_path / "w.safetensors", state, INFO)
    loaded, info = load_weights(tmp_path / "w.safetensors", package="paper")
    assert info == INFO
    assert loaded.keys() == state.keys()
    for name in state:
        torch.testing.assert_close(loaded[name], state[name], rtol=0, atol=0)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    shared = torch.ones(4)
    save_weights(tmp_path / "w.safetensors", {"a": shared, "b": shared, "c": shared[:2]}, INFO)
    assert load_weights(tmp_path / "w.safetensors")[0]["c"].tolist() == [1, 1]


def test_training_checkpoint_holds_what_went_in(tmp_path):
    state = {"step": 3, "model": {"w": torch.ones(2)}, "ema": None, "list": [1.5, (True, None, "x")]}
    save_checkpoint(tmp_path / "last.ckpt", state)
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    assert loaded["list"] == [1.5, (True, None, "x")]
    assert loaded["step"] == 3
    assert loaded["model"]["w"].tolist() == [1, 1]


def test_checkpoint_refuses_types_that_safe_loading_would_refuse(tmp_path):
    with pytest.raises(AssertionError, match=r"checkpoint\['metrics'\]\['ap'\] is a float64"):
        save_checkpoint(tmp_path / "last.ckpt", {"metrics": {"ap": np.float64(1)}})


def test_weights_come_out_of_a_training_checkpoint_averaged_where_it_has_them(tmp_path):
    state = {"model": {"w": torch.zeros(1)}, "ema": {"w": torch.ones(1)}, "info": INFO.to_json()}
    save_checkpoint(tmp_path / "last.ckpt", state)
    weights, info = load_weights(tmp_path / "last.ckpt")
    assert (weights["w"].item(), info) == (1, INFO)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_torch_pickles_of_every_wrapping(tmp_path, legacy, wrapper):
    state = collections.OrderedDict({"module.conv.weight": torch.ones(2, 2), "module.n": torch.tensor(4)})
    content = state if wrapper is None else {wrapper: state, "meta": {"epoch": 12}, "iteration": np.int64(3)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    loaded = read_state_dict(tmp_path / "w.pth")
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {"conv.weight": [[1, 1], [1, 1]], "n": 4}


@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_pickle_of_detectron(tmp_path, protocol):
    arrays = {"conv1_w": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.ones((), np.int64)}
    content = {"model": arrays, "__author__": "somebody", "matching_heuristics": True, "scalar": np.float32(2)}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = read_state_dict(tmp_path / "w.pkl")
    assert loaded["conv1_w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["count"].dtype == torch.int64


def test_numpy_pickle_of_python_2(tmp_path):
    # What Python 2 wrote: protocol 2, the old module name, the data as a byte string with high bytes.
    content = {"blobs": {"w": np.array([-1.5, 3e-9], dtype=np.float32)}}
    data = pickle.dumps(content, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "w.pkl").write_bytes(data)
    assert read_state_dict(tmp_path / "w.pkl")["w"].tolist() == pytest.approx([-1.5, 3e-9])


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("save", [lambda o, p: torch.save(o, p), lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_no_file_runs_code(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"model": {"w": RunsCode()}}, tmp_path / "w.pkl")
    with pytest.raises(WeightsError, match=r"could run code \(.*mkdir"):
        read_state_dict(tmp_path / "w.pkl")
    assert not (tmp_path / "owned").exists()


def test_other_python_objects_are_refused_by_name(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "args": SimpleNamespace(lr=1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"could run code \(types\.SimpleNamespace\)"):
        read_state_dict(tmp_path / "w.pth")


def test_numpy_arrays_of_objects_and_bogus_shapes_are_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": np.array([1, "x"], dtype=object)}))
    with pytest.raises(WeightsError, match="no tensors"):
        read_state_dict(tmp_path / "a.pkl")

    class Huge:
        def __reduce__(self):
            return np._core.multiarray._reconstruct, (np.ndarray, (1 << 40,), b"b")

    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"w": Huge()}))
    with pytest.raises(WeightsError, match="could run code"):
        read_state_dict(tmp_path / "b.pkl")


def torch_file():
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1000)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\n  <!DOCTYPE html><html>Quota exceeded", "HTML page"),
        (b"<html><body>log in", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
        (torch_file()[:2000], "cut short"),
        (torch_file()[:-40], "cut short"),
        (checkpoint._LEGACY_TORCH + b"junk", "damaged or cut short"),
        (pickle.dumps({"w": np.ones(100)})[:300], "damaged or cut short"),
        (b'{"images": []}', "JSON text"),
        (b"\x1f\x8b\x08aaaa", "gzip"),
        (b"hello there, some text", "not in a format weights come in"),
        (b"\x10\0\0\0\0\0\0\0{broken header}  ", "damaged safetensors header"),
        (b"\xff\0\0\0\0\0\0\0{", "cut short"),
    ],
)
def test_damaged_files_are_named(tmp_path, data, message):
    (tmp_path / "sipmask.pth").write_bytes(data)
    for read in (read_state_dict, load_weights, load_checkpoint):
        with pytest.raises(WeightsError, match=message) as caught:
            read(tmp_path / "sipmask.pth")
        assert "sipmask.pth" in caught.value.what
        assert "\n" not in caught.value.what + caught.value.fix


def test_html_error_names_the_command_that_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sipmask.pth").write_bytes(b"<html>")
    with pytest.raises(WeightsError) as caught:
        read_state_dict("sipmask.pth", package="sipmask")
    assert str(caught.value) == (
        "weights 'sipmask.pth' is an HTML page, not a checkpoint (a login or quota page saved by a browser or wget?)\n"
        "  fix: download the file itself, then: python -m sipmask.convert --from sipmask.pth --to sipmask.safetensors"
    )


def test_cut_safetensors_say_how_much_is_missing(tmp_path):
    save_weights(tmp_path / "w.safetensors", {"w": torch.zeros(1000)}, INFO)
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[:-100])
    with pytest.raises(WeightsError, match=f"cut short \\({len(data) - 100:,} of {len(data):,} bytes"):
        load_weights(tmp_path / "w.safetensors")


def test_damaged_weights_of_ours_are_not_to_be_converted(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError) as caught:
        load_weights(tmp_path / "w.safetensors", package="sipmask")
    assert caught.value.fix == "download the file itself"


def test_missing_file_lists_what_lies_beside_it(tmp_path):
    (tmp_path / "best.safetensors").touch()
    with pytest.raises(WeightsError, match=r"beside it: best\.safetensors"):
        load_weights(tmp_path / "bset.safetensors")
    with pytest.raises(WeightsError, match="are a folder"):
        load_weights(tmp_path)
    (tmp_path / "decode.safetensors").touch()
    with pytest.raises(WeightsError, match="are an exported model"):
        load_weights(tmp_path)
    with pytest.raises(WeightsError, match="no folder"):
        load_weights(tmp_path / "nowhere" / "w.pth")


def test_foreign_weights_are_sent_to_convert(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "official.pth")
    with pytest.raises(
        WeightsError, match=r"python -m paper\.convert --from .*official\.pth --to official\.safetensors"
    ):
        load_weights(tmp_path / "official.pth", package="paper")
    with pytest.raises(WeightsError, match="not a training checkpoint"):
        load_checkpoint(tmp_path / "official.pth")


def test_weights_of_another_package_are_refused(tmp_path):
    save_weights(tmp_path / "w.safetensors", {"w": torch.ones(1)}, INFO)
    with pytest.raises(WeightsError, match="belong to paper, not to other"):
        load_weights(tmp_path / "w.safetensors", package="other")


def test_matching_weights_load_whole():
    source, model = Detector(), Detector()
    assert load_into(model, source.state_dict(), INFO, categories=INFO.categories) == []
    assert torch.equal(model.classify.weight, source.classify.weight)


def test_other_number_of_categories_is_an_error_that_names_reinit():
    with pytest.raises(WeightsError) as caught:
        categories = [(1, "person"), (2, "helmet"), (3, "vest")]
        load_into(Detector(3), Detector(2).state_dict(), INFO, categories=categories, dataset="my")
    assert caught.value.what == "weights know 2 categories, dataset 'my' has 3 (person, helmet, vest)"
    assert caught.value.fix == "add --head reinit to keep the trunk and start a new head"


@pytest.mark.parametrize("num_classes", [2, 3])
def test_reinit_starts_the_class_layer_anew_and_keeps_the_rest(num_classes):
    source, model = Detector(2), Detector(num_classes)
    before = model.classify.weight.clone()
    categories = [(i, f"new {i}") for i in range(num_classes)]
    restarted = load_into(model, source.state_dict(), INFO, head="reinit", categories=categories)
    assert restarted == ["classify.weight", "classify.bias"]
    assert torch.equal(model.classify.weight, before)
    assert torch.equal(model.backbone[0].weight, source.backbone[0].weight)


class Fitted(Detector):
    """With a table that was fitted to data and a norm that learns; its classes are as many as the table has rows."""

    def __init__(self, rows=2, num_classes=2):
        super().__init__(num_classes)
        self.norm = nn.BatchNorm1d(num_classes)
        self.codec = nn.Module()
        self.codec.register_buffer("table", torch.randn(rows, 3))


def test_what_was_fitted_never_starts_anew():
    source, model = Fitted(), Fitted()
    source.norm.running_mean += 1
    restarted = load_into(model, source.state_dict(), INFO, head="reinit", categories=[(1, "bird"), (2, "dog")])
    norm = [f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    assert restarted == ["classify.weight", "classify.bias", *norm]
    assert torch.equal(model.codec.table, source.codec.table)
    assert not model.norm.running_mean.any()
    with pytest.raises(WeightsError, match=r"cannot start anew: codec\.table"):
        load_into(Fitted(rows=3), source.state_dict(), INFO, head="reinit", categories=[(1, "bird"), (2, "dog")])


def test_same_number_of_other_categories_is_noticed():
    with pytest.raises(WeightsError, match="cat / bird"):
        load_into(Detector(), Detector().state_dict(), INFO, categories=[(1, "bird"), (2, "d'og")], dataset="my")


def test_missing_surplus_and_misshapen_tensors_are_errors():
    state = Detector().state_dict()
    state["extra"] = state.pop("classify.bias")
    with pytest.raises(WeightsError, match=r"lack classify\.bias and hold extra"):
        load_into(Detector(), state, INFO)
    with pytest.raises(WeightsError, match=r"backbone\.0\.weight is \[5, 3, 1, 1\], the model's \[4, 3, 1, 1\]"):
        load_into(Detector(), Detector(width=5).state_dict(), INFO)
    with pytest.raises(WeightsError, match="another backbone"):
        load_into(Detector(), Detector(width=5).state_dict(), INFO, head="reinit")
