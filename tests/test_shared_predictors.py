"""One `Predictor` for many threads, and its copies in other processes, as Ray and Spark make them."""

import multiprocessing
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from onestage.engine import predict
from onestage.engine.predict import Predictor

PAPERS = sorted(
    path.parent.name for path in Path(__file__).parents[1].glob("*/pyproject.toml") if path.parent.name != "core"
)
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = [torch.randint(256, (3, 70 + 10 * i, 90), dtype=torch.uint8, generator=GENERATOR) for i in range(4)]


def predictor(package, **how):
    method = import_module(f"{package}.method").METHOD
    demo = method.variants[method.demo_variant]
    torch.manual_seed(0)
    model = method.build(replace(demo, inference=replace(demo.inference, score_threshold=0.005)))
    with torch.no_grad():
        torch.nn.init.normal_(model.head.logits.weight, std=0.1)
    return Predictor(model, [(1, "a"), (2, "b"), (3, "c")], device="cpu", **how)


def shown(results):
    return [(r.boxes.tolist(), r.scores.tolist(), r.labels.tolist(), r.rle) for r in results]


@pytest.mark.parametrize("package", PAPERS)
def test_four_threads_find_what_one_finds_and_so_does_a_copy(package):
    shared = predictor(package)
    expected = shown(shared(IMAGES))
    assert any(boxes for boxes, *_ in expected)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(shared, image) for _ in range(3) for image in IMAGES]
        found = shown([job.result() for job in jobs])
    assert found == expected * 3
    assert shown(pickle.loads(pickle.dumps(shared))(IMAGES[:1])) == expected[:1]


@pytest.mark.slow
def test_a_spawned_process_finds_the_same_with_its_copy():
    own = predictor("sipmask")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        (found,) = pool.map(own, IMAGES[:1])
    assert shown([found]) == shown([own(IMAGES[0])])


def test_a_copy_prepares_its_network_anew():
    own = predictor("sais", channels_last=True)
    copied = pickle.loads(pickle.dumps(own))
    assert copied.model.raw_outputs is not own.model.raw_outputs
    assert "raw_outputs" in own.model.__dict__
    assert shown(copied(IMAGES[:1])) == shown(own(IMAGES[:1]))


def test_graphs_take_one_image_after_the_other(monkeypatch):
    monkeypatch.setattr(predict, "prepare_network", lambda model, **how: None)
    inside, most = [], []

    class Slow(torch.nn.Module):
        def detect(self, images):
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.01)
            inside.pop()
            raise StopAsyncIteration  # nothing to make a result of

    def once(model):
        with pytest.raises(StopAsyncIteration):
            model(IMAGES[0])

    for mode, together in (("graph", 1), ("eager", 2)):
        most.clear()
        shared = Predictor(Slow(), [], device="cpu", mode=mode)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(once, [shared] * 8))
        assert min(max(most), 2) == together
