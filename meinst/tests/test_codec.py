import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from meinst.codec import Encoding, MaskCodec, PixelCodec, mean_iou, noisy_logits, pixel_confusion
from meinst.config import MEInstConfig
from onestage.errors import MachineError, WeightsError

TINY = MEInstConfig(mask_size=2, code_length=2, num_classes=3)


def _encoding(sets=1, length=2, **facts):
    components = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5], [0.5, 0.5, -0.5, -0.5]])[:length]
    components = components.repeat(sets, 1, 1) * torch.arange(1, sets + 1)[:, None, None]
    variance = torch.tensor([4.0, 1.0, 0.25])[:length].repeat(sets, 1)
    mean = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).repeat(sets, 1)
    return Encoding(components, mean, variance, variance / 10, facts)


def test_noisy_logits_by_hand():
    noise = torch.tensor([0.1, 0.1, 0.8, 0.8])  # v: 0.01 (floor), 0.01, 0.04, 0.04
    logits = noisy_logits(torch.tensor([1.0, 0.0, 1.0, 0.0]), noise)
    assert_close(logits, torch.tensor([math.log(99), -math.log(99), math.log(24), -math.log(24)]))


@pytest.mark.parametrize(("whiten", "codes"), [(True, [0.5, 0.0]), (False, [1.0, 0.0])])
def test_a_code_by_hand(whiten, codes):
    codec = MaskCodec(replace(TINY, whiten=whiten, noisy_logits=False))
    codec.load(_encoding())
    mask = torch.tensor([[[1, 1], [1, 1]]])  # minus the mean: 0, 1, 1, 0
    assert_close(codec.encode(mask), torch.tensor([codes]))
    # Back: 0.5 everywhere plus the mean, then clamped below 1.
    assert_close(codec.logits(torch.tensor([codes])), torch.tensor([[1.5, 0.5, 0.5, 1.5]]))
    assert_close(codec.decode(torch.tensor([codes])), torch.tensor([[[0.99, 0.5], [0.5, 0.99]]]))


def test_with_noisy_logits_decoding_ends_in_a_sigmoid():
    codec = MaskCodec(TINY)
    codec.load(_encoding())
    codes = torch.tensor([[1.0, 2.0]])
    assert_close(codec.decode(codes).flatten(1), codec.logits(codes).sigmoid())


def test_each_class_may_have_its_own_components():
    codec = MaskCodec(replace(TINY, class_agnostic=False, noisy_logits=False))
    codec.load(_encoding(sets=3))
    masks, labels = torch.ones(2, 2, 2), torch.tensor([0, 2])
    assert_close(codec.encode(masks, labels), torch.tensor([[0.5, 0.0], [1.5, 0.0]]))
    alone = MaskCodec(replace(TINY, noisy_logits=False))
    alone.load(_encoding())
    codes = torch.randn(1, 2)
    assert_close(codec.logits(codes, labels[:1]), alone.logits(codes))


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_codes_survive_decoding(seed, whiten, noisy):
    torch.manual_seed(seed)
    codec = MaskCodec(MEInstConfig(mask_size=8, code_length=10, whiten=whiten, noisy_logits=noisy))
    codes = torch.randn(4, 10)
    values = codec.logits(codes) - codec.mean
    again = values @ codec.components.T / (codec.variance.sqrt() if whiten else 1)
    assert_close(again, codes, atol=1e-4, rtol=1e-4)


def test_an_unfitted_codec_starts_with_orthonormal_cosines_that_already_carry_shapes():
    codec = MaskCodec(MEInstConfig())
    assert_close(codec.components @ codec.components.T, torch.eye(60), atol=1e-5, rtol=0)
    y, x = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    disc = ((y - 13.5) ** 2 + (x - 13.5) ** 2 < 100)[None]
    soft = codec.decode(codec.encode(disc, noise=torch.zeros(1, 784)))
    assert mean_iou(pixel_confusion(disc, soft >= 0.5)) > 0.9


def test_gradients_reach_codes_through_the_decoder_but_not_the_components():
    codec = MaskCodec(TINY)
    codes = torch.zeros(1, 2, requires_grad=True)
    codec.logits(codes).sum().backward()
    assert codes.grad.abs().sum() > 0
    assert not list(codec.parameters())


def test_weights_carry_the_components():
    codec, other = MaskCodec(TINY), MaskCodec(TINY)
    codec.load(_encoding())
    other.load_state_dict(codec.state_dict())
    assert_close(other.components, _encoding().components[0])


def test_without_an_encoding_a_code_is_the_logits_of_the_pixels():
    codec = PixelCodec(TINY)
    codes = torch.tensor([[0.0, 10.0, -10.0, 0.0]])
    assert codec.logits(codes) is codes
    assert_close(codec.decode(codes), torch.tensor([[[0.5, 1.0], [0.0, 0.5]]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["encoding.npz", "encoding.safetensors"])
def test_files_come_back_as_they_were(tmp_path, name):
    _encoding(noisy_logits=True, masks=7).write(tmp_path / name)
    back = Encoding.read(tmp_path / name)
    for field in ("components", "mean", "variance", "ratio"):
        assert_close(getattr(back, field), getattr(_encoding(), field))
    assert back.facts == ({} if name.endswith("npz") else {"noisy_logits": True, "masks": 7})
    assert back.source == str(tmp_path / name)


def test_an_npz_holds_the_official_arrays_alone_for_any_numpy(tmp_path, monkeypatch):
    """Older ones take every keyword for an array."""
    save = np.savez
    stored = []
    monkeypatch.setattr(np, "savez", lambda file, **arrays: stored.extend(arrays) or save(file, **arrays))
    _encoding().write(tmp_path / "encoding.npz")
    assert sorted(stored) == ["components_c", "explained_variance_c", "mean_c", "ratio_c"]


@pytest.mark.parametrize("name", ["encoding.npz", "encoding.safetensors"])
def test_an_older_file_stays_when_the_disk_is_full(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"old")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(MachineError, match="no space"):
        _encoding().write(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"old"


def test_the_authors_name_of_a_file_says_whether_its_logits_were_noisy(tmp_path):
    names = [f"coco_2017_train_class_agnosticTrue_whitenTrue_sigmoid{noisy}_2.npz" for noisy in (True, False)]
    for name in names:
        _encoding().write(tmp_path / name)
    MaskCodec(TINY).load(Encoding.read(tmp_path / names[0]))
    with pytest.raises(WeightsError, match="noisy_logits=False, the model has True"):
        MaskCodec(TINY).load(Encoding.read(tmp_path / names[1]))


def test_an_official_file_is_read_by_its_array_names(tmp_path):
    arrays = {"components_c": np.eye(4, dtype=np.float32)[None, :2], "mean_c": np.zeros((1, 4), np.float32)}
    arrays |= {"ratio_c": np.ones((1, 2), np.float32), "explained_variance_c": np.full((1, 2), 9, np.float32)}
    np.savez(tmp_path / "official.npz", **arrays)
    codec = MaskCodec(TINY)
    codec.load(Encoding.read(tmp_path / "official.npz"))
    assert codec.variance.tolist() == [9, 9]


def test_of_a_longer_code_the_first_components_are_taken():
    codec = MaskCodec(TINY)
    codec.load(_encoding(length=3))
    assert_close(codec.components, _encoding(length=2).components[0])


@pytest.mark.parametrize(
    ("config", "encoding", "problem"),
    [
        (replace(TINY, mask_size=3), _encoding(), "encodes 4 pixels"),
        (replace(TINY, code_length=3), _encoding(), "has 2 components, the model wants 3"),
        (TINY, _encoding(sets=3), "has 3 sets of components"),
        (TINY, _encoding(noisy_logits=False), "noisy_logits=False"),
    ],
)
def test_an_encoding_that_does_not_fit_is_refused(config, encoding, problem):
    with pytest.raises(WeightsError, match=problem):
        MaskCodec(config).load(encoding)


def test_a_file_that_is_no_encoding_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        Encoding.read(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("<html>")
    with pytest.raises(WeightsError, match="cannot be read"):
        Encoding.read(tmp_path / "text.npz")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(WeightsError, match="cannot be read"):
        Encoding.read(tmp_path / "text.safetensors")
    np.savez(tmp_path / "code.npz", components_c=np.array([{"a": 1}], dtype=object))
    with pytest.raises(WeightsError, match="cannot be read"):
        Encoding.read(tmp_path / "code.npz")
    names = ("components_c", "mean_c", "ratio_c", "explained_variance_c")
    np.savez(tmp_path / "shapes.npz", **{name: np.zeros((2, 3, 4)) for name in names})
    with pytest.raises(WeightsError, match="a mean of"):
        Encoding.read(tmp_path / "shapes.npz")


def test_the_reconstruction_measure_is_over_all_pixels():
    truth = torch.tensor([[[1, 1], [1, 0]], [[0, 0], [0, 0]]])
    guess = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 1]]])
    confusion = pixel_confusion(truth, guess)
    assert confusion.tolist() == [[4, 1], [1, 2]]
    assert mean_iou(confusion) == pytest.approx((4 / 6 + 2 / 4) / 2)
