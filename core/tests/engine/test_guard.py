import math
import random

import numpy as np
import pytest
import torch

from onestage.engine.checkpoint import WeightsInfo, load_checkpoint, load_weights
from onestage.engine.guard import NonFiniteLoss, Suspect, autocast, info_of_crash, replay, seed_step
from onestage.errors import UsageError, WeightsError
from onestage.structures import Reference, Target


@pytest.fixture
def exploding(tiny):
    """A tiny model whose class logits become infinite in the batch after `calm` batches."""

    class Exploding(tiny.TinyModel):
        calm = 3

        def forward(self, images, targets):
            self.calm -= 1
            self.backbone[1].weight.data.mul_(1e30 if self.calm < 0 else 1.0)
            self.logits.weight.data.mul_(1e30 if self.calm < 0 else 1.0)
            return super().forward(images, targets)

    torch.manual_seed(0)
    return Exploding(tiny.TinyConfig())


def test_a_precision_that_is_not_known_is_refused():
    with pytest.raises(UsageError, match="precision 'float16' is unknown") as caught:
        autocast(torch.device("cpu"), "float16")
    assert caught.value.fix == "use one of fp32, bf16, fp16"


def test_random_state_follows_from_seed_rank_and_batch():
    def draws(*position):
        seed_step(*position)
        return torch.rand(()).item(), random.random(), np.random.rand()

    assert draws(0, 0, 5) == draws(0, 0, 5)
    assert len({draws(*position) for position in ((0, 0, 5), (0, 0, 6), (0, 1, 5), (1, 0, 5))}) == 4


def test_a_loss_that_is_not_finite_stops_and_says_where(tiny, tmp_path, exploding):
    with pytest.raises(NonFiniteLoss) as caught:
        tiny.run_tiny(tmp_path, model=exploding)
    error = caught.value
    assert error.what.startswith("loss_cls")
    assert "is not finite at step 3 (rank 0, images " in error.what
    assert " px); batch saved to " in error.what
    assert error.what.endswith("crash-3.pt")
    assert f"--replay {tmp_path / 'crash-3.pt'}" in error.fix
    assert "learning rate 0.0427 for total batch 4" in error.fix
    assert "(this batch has 0)" in error.fix
    assert "\n" not in error.what + error.fix
    assert error.exit_code == 1


def test_replay_repeats_the_loss_and_names_the_layer(tiny, tmp_path, exploding):
    with pytest.raises(NonFiniteLoss):
        tiny.run_tiny(tmp_path, model=exploding)
    model = tiny.TinyModel(tiny.TinyConfig())
    first, second = (replay(tmp_path / "crash-3.pt", model) for _ in range(2))
    assert not math.isfinite(first.losses["loss_cls"])
    assert first.first_layer == "logits"
    assert first.step == 3
    assert str(first) == str(second)  # NaN equals NaN in text


def test_replay_repeats_a_finite_batch_bit_for_bit(tiny, tmp_path, monkeypatch):
    seen = []

    class NotFiniteByName(tiny.TinyModel):
        def forward(self, images, targets):
            losses = super().forward(images, targets)
            seen.append(losses["loss_cls"].item())
            return {**losses, "loss_extra": losses["loss_cls"] * (math.nan if len(seen) == 3 else 0)}

    with pytest.raises(NonFiniteLoss, match="loss_extra is not finite at step 2"):
        tiny.run_tiny(tmp_path, model=NotFiniteByName(tiny.TinyConfig()))
    again = replay(tmp_path / "crash-2.pt", tiny.TinyModel(tiny.TinyConfig()))
    assert again.losses["loss_cls"] == seen[-1]  # dropout and noise drew the same
    assert again.first_layer is None


def test_a_target_is_kept_whole(tiny, tmp_path):
    box, one = torch.tensor([[1.0, 1.0, 9.0, 9.0]]), torch.tensor([1])
    mask = torch.ones(1, 16, 16, dtype=torch.uint8)
    reference = Reference(torch.full((3, 16, 16), 0.5), box + 1, torch.tensor([7]))
    polygons = (((1.0, 1.0, 9.0, 1.0, 9.0, 9.0),), None)[:1]
    target = Target(box, one, mask, one < 0, 5, polygons, torch.tensor([7]), reference)
    seen = []

    class Watching(tiny.TinyModel):
        def forward(self, images, targets):
            seen.extend(targets)
            return super().forward(images, targets)

    model = Watching(tiny.TinyConfig())
    images = [torch.zeros(3, 16, 16), torch.ones(3, 16, 16)]
    info = WeightsInfo(package="tiny", config={"width": 4})
    Suspect(images, [target, target], (0, 0, 0), 0, 0.1, 2, "fp32").save(tmp_path / "crash-0.pt", model, info)
    assert info_of_crash(tmp_path / "crash-0.pt") == info
    replay(tmp_path / "crash-0.pt", model)
    assert seen[0].track_ids.tolist() == seen[1].reference.track_ids.tolist() == [7]
    assert torch.equal(seen[0].reference.image, reference.image)
    assert (seen[0].polygons, seen[0].image_id) == (polygons, 5)


def test_the_checkpoint_before_the_crash_stays(tiny, tmp_path, exploding):
    with pytest.raises(NonFiniteLoss):
        tiny.run_tiny(tmp_path, {"save_every": 1}, model=exploding)
    saved = load_checkpoint(tmp_path / "last.ckpt")
    assert saved["state"]["step"] == 3
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    with pytest.raises(WeightsError, match="not a training checkpoint"):
        load_checkpoint(tmp_path / "crash-3.pt")


def test_skipping_leaves_the_weights_alone_and_goes_on(tiny, tmp_path):
    class OnceNotFinite(tiny.TinyModel):
        calls = 0

        def forward(self, images, targets):
            self.calls += 1
            losses = super().forward(images, targets)
            return {name: value * (math.nan if self.calls == 3 else 1) for name, value in losses.items()}

    run = tiny.run_tiny(tmp_path, {"nan_policy": "skip"}, model=OnceNotFinite(tiny.TinyConfig()))
    assert run.result.steps == 12
    assert load_checkpoint(tmp_path / "last.ckpt")["state"]["skipped"] == 1
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())
    assert not list(tmp_path.glob("crash*"))


def test_ten_skipped_steps_in_a_row_stop_the_run(tiny, tmp_path):
    class NeverFiniteAgain(tiny.TinyModel):
        calls = 0

        def forward(self, images, targets):
            self.calls += 1
            losses = super().forward(images, targets)
            bad = self.calls % 2 == 0 and self.calls != 4  # the second batch of every step but one
            return {name: value * (math.nan if bad else 1) for name, value in losses.items()}

    model = NeverFiniteAgain(tiny.TinyConfig())
    with pytest.raises(NonFiniteLoss, match=r"is not finite at step 11 .*batch saved to"):
        tiny.run_tiny(tmp_path, {"nan_policy": "skip", "accumulate": 2}, {"length": 30}, model=model)


class FiniteLossOnly(torch.autograd.Function):
    """Zero, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, value):
        return value * 0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


@pytest.mark.parametrize("evaluates", [False, True])
def test_weights_that_a_gradient_has_spoiled_are_not_saved(tiny, tmp_path, evaluates):
    class Spoiled(tiny.TinyModel):
        calls = 0

        def forward(self, images, targets):
            self.calls += 1
            extra = FiniteLossOnly.apply(self.box.bias[0]) if self.calls == 3 else self.box.bias[0] * 0
            return {**super().forward(images, targets), "loss_extra": extra}

    options = {"eval_every": 1, "save_every": 0} if evaluates else {"save_every": 1, "eval_every": 0}
    with pytest.raises(NonFiniteLoss) as caught:
        tiny.run_tiny(tmp_path, options, model=Spoiled(tiny.TinyConfig()), val_set=tiny.TinySet(3))
    assert caught.value.what.startswith("after step 3 the weights are not finite (")
    if evaluates:
        assert load_weights(tmp_path / "best.safetensors")[1].steps < 3
        assert caught.value.fix.startswith("start again, ")
    else:
        assert caught.value.fix.startswith(f"go on with --resume {tmp_path / 'last.ckpt'}, ")
        saved = load_checkpoint(tmp_path / "last.ckpt")
        assert saved["state"]["step"] == 2
        assert all(tensor.isfinite().all() for tensor in saved["model"].values())
