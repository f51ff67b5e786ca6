"""Parity with the authors' code: stored inputs, weights and outputs of their masks, encoding, head, losses, inference.

The files are described where they are made; tolerances are theirs.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from meinst.codec import Encoding, MaskCodec, mean_iou, noisy_logits, pixel_confusion
from meinst.config import R50
from meinst.convert import convert_head, model_keys, with_head
from meinst.decode import decode, select
from meinst.losses import compute_losses
from meinst.model import MEInst, MEInstHead, RawOutput
from meinst.pca import Batches, IncrementalPCA
from meinst.targets import assign_targets, polygon_mask
from onestage.engine.official import rename
from onestage.nn import fcos
from onestage.nn.towers import flatten_levels
from onestage.ops.paste import cut_mask
from onestage.structures import ImageFrame, Target
from onestage.transforms import prepare_batch

pytestmark = pytest.mark.golden
LEVELS = ("p3", "p4", "p5", "p6", "p7")


def test_polygons_fill_the_grid_of_a_box(golden):
    case = golden("meinst_rasterize")
    instances = _polygons(case, "gt/")
    for suffix, wanted in _grids(case, ""):
        boxes = case[f"boxes{suffix}"].numpy()
        filled = [polygon_mask(parts, box, wanted.shape[-1]) for parts, box in zip(instances, boxes, strict=True)]
        assert np.array_equal(np.stack(filled), wanted.numpy())


def test_bitmaps_fill_the_grid_of_a_box(golden):
    case = golden("meinst_rasterize")
    bitmaps = _unpacked(case["bitmask/packed"], tuple(case["bitmask/hw"].tolist()))
    for suffix, wanted in _grids(case, "bitmask/"):
        boxes = case[f"boxes{suffix}"][: len(bitmaps)]  # only the first instances are there as bitmaps
        filled = [cut_mask(bitmap, box, wanted.shape[-1]) for bitmap, box in zip(bitmaps, boxes, strict=True)]
        assert torch.equal(torch.stack(filled), wanted)


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("noisy", [True, False])
def test_codes_and_decoded_masks(golden, whiten, noisy):
    case = golden("meinst_codec")
    name = f"whiten{whiten:d}_sigmoid{noisy:d}"
    if f"{name}/encoded" not in case:
        pytest.skip(f"{name} is not in this meinst_codec file")
    codec = _codec(case, replace(_config(case), whiten=whiten, noisy_logits=noisy))
    noise = case.get(f"{name}/uniform")
    if noisy:
        assert_close(noisy_logits(case["masks"].flatten(1).float(), noise), case[f"{name}/logits"], atol=1e-5, rtol=0)
    encoded = codec.encode(case["masks"], noise=noise)
    assert (encoded - case[f"{name}/encoded"]).norm() < 1e-5 * case[f"{name}/encoded"].norm()
    assert_close(codec.logits(case["codes"]), case[f"{name}/decoded_train"], atol=1e-5, rtol=0)
    assert_close(codec.decode(case["codes"]).flatten(1), case[f"{name}/decoded_test"], atol=1e-5, rtol=0)
    assert_close(codec.decode(encoded).flatten(1), case[f"{name}/roundtrip_test"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("noisy", [True, False])
def test_fitted_components_and_their_reconstruction(golden, noisy):
    case = golden("meinst_pca_fit")
    if f"sigmoid{noisy:d}/components_c" not in case:
        pytest.skip(f"sigmoid{noisy:d} is not in this meinst_pca_fit file")
    stored = {key: case[f"sigmoid{noisy:d}/{key}"] for key in ("components_c", "mean_c", "explained_variance_c")}
    length = stored["components_c"].shape[1]
    values, noise = case["masks"].flatten(1).double(), case["uniform"] if noisy else None
    if noise is not None:
        values = noisy_logits(values, noise.double())
    pca, batches = IncrementalPCA(length), Batches(256, length)
    for batch in [*batches.push(values.numpy()), *batches.rest()]:
        pca.update(batch)
    ours = [torch.from_numpy(array).float() for array in (pca.components, pca.mean, pca.explained_variance, pca.ratio)]
    # The largest entry is positive on both sides; where two are almost as large, rounding chooses.
    ours[0] = ours[0] * (ours[0] * stored["components_c"][0]).sum(1, keepdim=True).sign()
    for values, wanted in zip(ours, stored.values(), strict=False):
        assert_close(values, wanted[0], atol=1e-4, rtol=1e-4)
    assert_close(ours[3], case[f"sigmoid{noisy:d}/ratio_c"][0], atol=1e-4, rtol=0)

    codec = MaskCodec(replace(R50, code_length=length, noisy_logits=noisy, mask_size=case["masks"].shape[-1]))
    codec.load(Encoding(*(values[None] for values in ours), facts={}))
    soft = codec.decode(codec.encode(case["masks"], noise=noise))
    binary = (soft >= 0.5).byte()
    assert (binary == case[f"sigmoid{noisy:d}/recon_binary"]).float().mean() >= 0.999
    confusion = pixel_confusion(case["masks"], binary)
    assert_close(confusion.double(), case[f"sigmoid{noisy:d}/confusion"], atol=1e-3 * binary.numel(), rtol=0)
    hits = confusion.diagonal()
    iou_per_class = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    assert_close(iou_per_class.double(), case[f"sigmoid{noisy:d}/iou_per_class"], atol=1e-4, rtol=0)
    assert abs(mean_iou(confusion) - case[f"sigmoid{noisy:d}/mean_iou"].item()) < 1e-4


@pytest.mark.parametrize("file", ["meinst_head", "meinst_head_more"])
def test_head_outputs(golden, file):
    case = golden(file)
    features = [case[f"feat/{level}"] for level in LEVELS]
    variants = sorted({key.split("/")[0] for key in case if "/sd/" in key})
    assert variants
    for variant in variants:
        head = _head({key.split("/sd/")[1]: value for key, value in case.items() if key.startswith(f"{variant}/sd/")})
        with torch.no_grad():
            raw = head.train()(features)
            _check_raw(raw, _stored(case, f"{variant}/out/"), 1e-4)
            # At inference the codes exist only where they are asked for, and are the same.
            raw, dense = head.eval()(features), raw.codes
            index = torch.arange(0, dense.shape[1], 5).flip(0)
            for image in range(len(dense)):
                assert_close(head.codes_at(raw, image, index), dense[image, index], atol=1e-5, rtol=1e-5)


TRAINING = {
    "default": {},
    "loss_on_mask": {"loss_on_mask": True},
    "no_center_sampling": {"center_radius": None},
    "radius1_iou": {"center_radius": 1.0, "box_loss": "iou"},
    "linear_iou": {"box_loss": "linear_iou"},
    "no_sigmoid": {"noisy_logits": False},
    "small_ranges": {"level_limits": (16, 32, 64, 128)},
}


def test_every_stored_training_setting_is_known(golden):
    stored = {key.split("/")[0] for key in golden("meinst_train") if key.endswith("/labels")}
    assert stored <= TRAINING.keys()


@pytest.mark.parametrize("variant", TRAINING)
def test_targets_losses_and_gradients(golden, variant):
    file = golden("meinst_train")
    if f"{variant}/labels" not in file:
        pytest.skip(f"{variant} is not in this meinst_train file")
    case = {key.removeprefix(f"{variant}/"): value for key, value in file.items() if key.startswith(f"{variant}/")}
    num_classes = file["in/p3/cls"].shape[1]
    config = replace(_config(file), num_classes=num_classes, **TRAINING[variant])
    outputs = {kind: value.requires_grad_() for kind, value in _stored(file, "in/").items()}
    raw = _raw(outputs, [tuple(size) for size in file["feature_sizes"].tolist()])
    targets = assign_targets(_targets(file, len(file["image_sizes"])), raw, config)

    order = _level_major(raw.sizes, len(raw.logits))  # theirs: level, then image, then location
    labels = targets.assignment.labels.flatten()[order]
    assert torch.equal(torch.where(labels < 0, num_classes, labels), case["labels"])
    positive = (labels >= 0).nonzero().flatten()
    assert torch.equal(positive, case["pos_inds"])
    ltrb = (targets.assignment.ltrb / targets.assignment.strides[:, None]).flatten(0, 1)[order][positive]
    assert_close(ltrb, case["pos_reg_targets"], atol=1e-5, rtol=1e-5)
    assert_close(fcos.centerness_target(ltrb), case["pos_ctr_targets"], atol=1e-5, rtol=1e-5)

    ours = order[positive].argsort().argsort()  # position of each of their positives among ours
    assert torch.equal(targets.masks[ours], case["pos_mask_targets"])
    codec = _codec(file, config)
    noise = None
    if "uniform" in case:
        noise = torch.empty_like(case["uniform"])
        noise[ours] = case["uniform"]
    if "pos_code_targets" in case:
        codes = codec.encode(targets.masks, noise=noise)[ours]
        assert_close(codes, case["pos_code_targets"], atol=1e-5, rtol=1e-5)

    losses = compute_losses(raw, targets, codec, config, noise)
    for name, theirs in (("cls", "cls"), ("box", "loc"), ("centerness", "ctr"), ("mask", "mask")):
        assert_close(losses[f"loss_{name}"], case[f"loss/{theirs}"], rtol=1e-5, atol=0)
    sum(losses.values()).backward()
    for kind, value in outputs.items():
        gradient = value.grad.flatten(0, 1)[order]
        if kind == "cls":
            assert_close(gradient, case["grad/cls"], atol=1e-6, rtol=0)
        else:
            assert_close(gradient[positive], case[f"grad_pos/{kind}"], atol=1e-6, rtol=0)
            elsewhere = torch.ones(len(gradient), dtype=torch.bool)
            elsewhere[positive] = False
            assert not gradient[elsewhere].any()


def test_inference(golden):
    case = golden("meinst_infer")
    names = [key.removesuffix("/in/p3/cls") for key in case if key.endswith("/in/p3/cls")]
    assert names
    for name in names:
        _check_inference(case, name)


def _check_inference(case, name):
    config = replace(_config(case), num_classes=case[f"{name}/in/p3/cls"].shape[1])
    config = replace(config, inference=replace(config.inference, threshold_with_centerness=name == "thresh_with_ctr"))
    sizes = [tuple(case[f"{name}/in/{level}/cls"].shape[-2:]) for level in LEVELS]
    raw = _raw(_stored(case, f"{name}/in/"), sizes)
    codec = _codec(case, config)
    frames = _frames(case)
    for i in range(len(frames)):
        wanted = {key: case[f"{name}/img{i}/net/{key}"] for key in ("boxes", "scores", "classes", "masks28")}
        kept, boxes = select(raw, i, config)
        soft = codec.decode(raw.codes[i, kept.index])
        # Locations are whole numbers: within the tolerance of boxes they are equal.
        wanted["boxes"] = torch.cat((wanted["boxes"], case[f"{name}/img{i}/net/locations"]), dim=1)
        boxes = torch.cat((boxes, raw.points[kept.index]), dim=1)
        pairs = _match(boxes, kept.scores, kept.labels, wanted, 1e-3)
        assert_close(soft[pairs], wanted["masks28"][:, 0], atol=1e-5, rtol=0)
    _check_detections(decode(raw, frames, lambda i, index: raw.codes[i, index], codec, config), case, f"{name}/", 1e-3)


def test_a_whole_model(golden):
    names = sorted(path.name for path in golden.folder.glob("meinst_model_*.pt*"))
    if not names:
        pytest.skip(f"no meinst_model_* in {golden.folder}")
    for name in names:
        _check_model(golden(name), stride_in_1x1=name.startswith("meinst_model_r"))


def _check_model(case, stride_in_1x1):
    model, config = _tiny_model(case, stride_in_1x1)
    pixels = _pixels(case, config.input)
    with torch.no_grad():
        _, *trunk = model.eval().backbone(pixels)
        pyramid = model.fpn(trunk)
        stages = [f"res{i}" for i in (3, 4, 5)]
        for feature, key in zip([*trunk, *pyramid], [*stages, *LEVELS], strict=True):
            assert_close(feature, case[f"feat/{key}"], atol=1e-3, rtol=0)
        raw = model.raw_outputs(pixels)
        found = decode(raw, _frames(case), lambda i, index: model.head.codes_at(raw, i, index), model.codec, config)
    _check_detections(found, case, "", 1e-2)

    raw = model.train().raw_outputs(pixels)
    _check_raw(raw, _stored(case, "out/"), 1e-3)
    targets = assign_targets(_targets(case, len(case["image_sizes"]), "gt/"), raw, config)
    order = _level_major(raw.sizes, len(raw.logits))
    positive = order[(targets.assignment.labels.flatten()[order] >= 0)]
    noise = torch.empty_like(case["train/uniform"])
    noise[positive.argsort().argsort()] = case["train/uniform"]
    losses = compute_losses(raw, targets, model.codec, config, noise)
    for ours, theirs in (("cls", "cls"), ("box", "loc"), ("centerness", "ctr"), ("mask", "mask")):
        assert_close(losses[f"loss_{ours}"], case[f"train/loss/{theirs}"], rtol=1e-4, atol=0)
    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    for key, gradient in case.items():
        if key.startswith("train/grad/"):
            ours = parameters[rename(key.removeprefix("train/grad/"), model_keys(config))].grad
            gradient = gradient.reshape(ours.shape)
            assert_close(ours, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
    frozen = [*model.backbone.stages()[0].parameters(), *model.backbone.stages()[1].parameters()]
    assert all(parameter.grad is None for parameter in frozen)


def _pixels(case, config):
    """The stored batch as the network sees it. Alone, each image has a test size that leaves it as it is."""
    alone = []
    for i, size in enumerate(case["image_sizes"].tolist()):
        unchanged = replace(config, test_size=(min(size), max(size)))
        batch = prepare_batch([case[f"img{i}/bgr_uint8"].flip(0)], None, unchanged, training=False)
        assert batch.frames[0].input_size == tuple(size)
        alone.append(batch.pixels[0])
    height, width = (max(pixels.shape[axis] for pixels in alone) for axis in (1, 2))
    assert [height, width] == case["padded_hw"].tolist()
    return torch.stack([F.pad(one, (0, width - one.shape[2], 0, height - one.shape[1])) for one in alone])


def _tiny_model(case, stride_in_1x1):
    """The stored model: our modules around tensors that are narrower than any trunk's name stands for."""
    state = {key.removeprefix("sd/"): value for key, value in case.items() if key.startswith("sd/")}
    head = {key.split("MEInst_head.")[1]: value for key, value in state.items() if "MEInst_head." in key}
    config = replace(
        with_head(R50, head),
        mask_size=round(state["proposal_generator.mask_encoding.components"].shape[1] ** 0.5),
        backbone=replace(R50.backbone, stride_in_1x1=stride_in_1x1),
        input=replace(R50.input, mean=tuple(case["pixel_mean"].tolist()), std=tuple(case["pixel_std"].tolist())),
    )
    stored = {rename(key, model_keys(config)): value for key, value in state.items() if not key.startswith("pixel_")}
    model = MEInst(config)
    for key, value in model.state_dict(keep_vars=True).items():
        if key.endswith("num_batches_tracked"):
            continue
        name, _, leaf = key.rpartition(".")
        tensor = stored.pop(key)
        if isinstance(value, nn.Parameter):
            tensor = tensor.reshape(()) if leaf == "scale" else tensor
            setattr(model.get_submodule(name), leaf, nn.Parameter(tensor, requires_grad=value.requires_grad))
        else:
            setattr(model.get_submodule(name), leaf, tensor)
    assert not stored
    for block in model.backbone.modules():
        if hasattr(block, "conv3"):
            block.conv2.groups = len(block.conv1.weight) // block.conv2.weight.shape[1]
    return model, config


def _head(state):
    config = with_head(R50, state)
    head = MEInstHead(config)
    head.load_state_dict(convert_head(state, config)[0])
    return head


def _config(case):
    _, length, pixels = case["components_c"].shape
    return replace(R50, code_length=length, mask_size=round(pixels**0.5))


def _codec(case, config):
    codec = MaskCodec(config)
    codec.load(Encoding(case["components_c"], case["mean_c"], case["explained_variance_c"], case["ratio_c"], facts={}))
    return codec


def _stored(case, prefix):
    """Stored head outputs by kind, [B, P, channels]."""
    kinds = {kind: [case[f"{prefix}{level}/{kind}"] for level in LEVELS] for kind in ("cls", "reg", "ctr", "mask")}
    return {kind: flatten_levels(maps, maps[0].shape[1]).clone() for kind, maps in kinds.items()}


def _raw(outputs, sizes):
    return RawOutput(
        outputs["cls"],
        outputs["reg"],
        outputs["ctr"].squeeze(2),
        outputs["mask"],
        [],
        fcos.locations(sizes),
        sizes,
    )


def _check_raw(raw, stored, tolerance):
    for ours, kind in ((raw.logits, "cls"), (raw.distances, "reg"), (raw.codes, "mask")):
        assert_close(ours, stored[kind], atol=tolerance, rtol=0)
    assert_close(raw.centerness, stored["ctr"].squeeze(2), atol=tolerance, rtol=0)


def _level_major(sizes, num_images):
    """Index of the stored order (level, image, location) into ours (image, level, location)."""
    counts = [height * width for height, width in sizes]
    index = torch.arange(num_images * sum(counts)).view(num_images, -1)
    return torch.cat([level.flatten() for level in index.split(counts, dim=1)])


def _polygons(case, prefix):
    """Polygons by instance, flat x, y lists."""
    found = {}
    for key, value in case.items():
        match = re.fullmatch(rf"{re.escape(prefix)}inst(\d+)/poly\d+", key)
        if match:
            found.setdefault(int(match[1]), []).append(tuple(value.tolist()))
    return tuple(tuple(found[i]) for i in sorted(found))


def _targets(case, num_images, part=""):
    targets = []
    for i in range(num_images):
        boxes, labels = case[f"img{i}/{part}boxes"], case[f"img{i}/{part}classes"]
        masks = torch.zeros(len(boxes), 1, 1, dtype=torch.uint8)  # never read: there are polygons
        crowds = torch.zeros(len(boxes), dtype=torch.bool)
        targets.append(Target(boxes, labels, masks, crowds, polygons=_polygons(case, f"img{i}/{part}")))
    return targets


def _frames(case):
    sizes = zip(case["output_sizes"].tolist(), case["image_sizes"].tolist(), strict=True)
    return [ImageFrame(tuple(out), tuple(net), tuple(net), (net[0] / out[0], net[1] / out[1])) for out, net in sizes]


def _check_detections(found, case, prefix, tolerance):
    for i, ours in enumerate(found):
        wanted = {
            key: case[f"{prefix}img{i}/post/{key}"]
            for key in ("boxes", "scores", "classes", "masks_packed", "mask_area")
        }
        pairs = _match(ours.boxes, ours.scores, ours.labels, wanted, tolerance)
        masks = _unpacked(wanted["masks_packed"], ours.image_size)
        few = 1e-3 * ours.image_size[0] * ours.image_size[1]
        assert ((ours.masks.to_bool()[pairs] != masks.bool()).sum((1, 2)) <= few).all()
        assert ((ours.masks.area()[pairs] - wanted["mask_area"]).abs() <= few).all()


def _match(boxes, scores, labels, wanted, tolerance):
    """For each stored detection the index of ours that is the same; each of ours is taken once."""
    assert len(boxes) == len(wanted["boxes"])
    same = (labels[None] == wanted["classes"][:, None]) & ((scores[None] - wanted["scores"][:, None]).abs() <= 1e-5)
    same &= ((boxes[None] - wanted["boxes"][:, None]).abs() <= tolerance).all(2)
    candidates = [row.nonzero().flatten().tolist() for row in same]
    stored_of = {}  # stored detection by ours

    def find(stored, tried):
        """Takes one of ours for `stored`, moving others on where they have a choice (augmenting paths)."""
        for ours in candidates[stored]:
            if ours not in tried:
                tried.add(ours)
                if ours not in stored_of or find(stored_of[ours], tried):
                    stored_of[ours] = stored
                    return True
        return False

    assert all(find(stored, set()) for stored in range(len(candidates)))
    return torch.tensor([ours for ours, _ in sorted(stored_of.items(), key=lambda pair: pair[1])], dtype=torch.int64)


def _grids(case, prefix):
    """Suffixes of stored masks (`_jittered`: of the jittered boxes) and the masks, of every grid."""
    keys = [match for match in (re.fullmatch(rf"{prefix}masks\d+(|_jittered)", key) for key in case) if match]
    assert keys
    return [(match[1], case[match[0]]) for match in keys]


def _unpacked(packed, size):
    count = size[0] * size[1]
    bits = np.unpackbits(packed.numpy(), axis=1)[:, :count] if len(packed) else np.zeros((0, count), np.uint8)
    return torch.from_numpy(bits.reshape(-1, *size))
