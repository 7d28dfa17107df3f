"""CUDA graphs of inference and training, on several streams and on a GPU that is not the current one; on a simulated
torch.cuda.
"""

import copy
import dataclasses

import pytest
import torch
from fake_torch_cuda import Gpu, Stream
from tiny import lively_model, tiny_config

from maskrcnn.config import LossConfig, TrainConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.model import losses
from maskrcnn.model.inference import GraphedModel
from maskrcnn.training.optimizer import AveragedWeights, make_optimizer
from maskrcnn.training.step import Step
from maskrcnn.training.trainer import Trainer

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")


def double(images: torch.Tensor, image_sizes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"doubled": (images + images).clone(), "sizes": image_sizes + 1}


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    """GPU 1; the current device of the thread is GPU 0."""
    found = Gpu(1)
    found.install(monkeypatch)
    return found


def calls(gpu: Gpu, graphed: GraphedModel, lengths: tuple[int, ...], start: int = 0) -> None:
    """Call with images of these heights on the current stream, and check every result."""
    for number, length in enumerate(lengths, start):
        images = torch.full((1, 3, length, 4), float(number))
        found = graphed(images, torch.full((1, 2), number))
        with gpu.unwatched():
            assert (found["doubled"] == 2 * number).all() and (found["sizes"] == number + 1).all()


def test_a_graph_is_captured_on_the_models_gpu(gpu):
    with gpu:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):  # unrelated, on GPU 0: PyTorch keeps its stream
            pass
        graphed = GraphedModel(double)
        calls(gpu, graphed, (4, 4, 4, 6, 6, 4))
        assert graphed.captured == 2
    assert not gpu.races


def work_on_two_streams(gpu: Gpu, graphed: GraphedModel) -> None:
    streams = [torch.cuda.Stream(torch.device("cpu")) for _ in range(2)]
    for start, (stream, lengths) in enumerate(zip(streams * 2, ((4, 4, 4), (4, 6, 6), (6, 4), (4, 6)), strict=True)):
        with torch.cuda.stream(stream):
            calls(gpu, graphed, lengths, 10 * start)


def test_graphs_on_different_streams_wait_for_each_other(gpu):
    graphed = GraphedModel(double)
    with gpu:
        work_on_two_streams(gpu, graphed)
    assert not gpu.races and graphed.captured == 2


def test_the_simulated_gpu_detects_graphs_that_do_not_wait(gpu, monkeypatch):
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    with gpu:
        work_on_two_streams(gpu, GraphedModel(double))
    assert any("pool" in race and "written" in race for race in gpu.races)
    assert any("pool" not in race for race in gpu.races)


def test_later_calls_wait_for_a_failed_one(gpu, monkeypatch):
    graphed = GraphedModel(double)
    streams = [torch.cuda.Stream(torch.device("cpu")) for _ in range(2)]
    with gpu:
        with torch.cuda.stream(streams[0]):
            calls(gpu, graphed, (4, 4, 4))
            with monkeypatch.context() as patched, pytest.raises(MemoryError):
                patched.setattr(torch.Tensor, "clone", lambda *_: (_ for _ in ()).throw(MemoryError()))
                graphed(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, dtype=torch.int64))
        with torch.cuda.stream(streams[1]):
            calls(gpu, graphed, (4,))
    assert not gpu.races


def test_a_discarded_graph_has_finished(gpu):
    with gpu:
        graphed = GraphedModel(double, shapes=2)
        calls(gpu, graphed, (4, 4, 6, 6, 8, 8, 4, 4))
        assert graphed.captured == 2
    assert not gpu.races


def test_a_shape_is_captured_at_its_second_call_and_discarded_when_least_recently_used(gpu):
    with gpu:
        graphed, captured = GraphedModel(double, shapes=2), []
        for number, length in enumerate((4, 4, 4, 6, 4, 6, 8, 4)):
            calls(gpu, graphed, (length,), number)
            captured.append(graphed.captured)
    assert captured == [0, 1, 1, 1, 1, 2, 1, 0]  # 8 replaced 4, so that the last 4 is new and replaces 6


def test_shapes_of_other_types_have_their_own_graphs(gpu):
    with gpu:
        graphed = GraphedModel(double, shapes=4)
        for dtype in (torch.float32, torch.uint8, torch.float32, torch.uint8):
            graphed(torch.zeros(1, 3, 4, 4, dtype=dtype), torch.zeros(1, 2))
        assert graphed.captured == 2


@TWO_GPUS
def test_a_model_on_the_second_gpu_computes_there():
    weights = torch.rand(8, 3, device="cuda:1")
    graphed = GraphedModel(lambda images, sizes: {"found": images.flatten(2).transpose(1, 2) @ weights.T + sizes.sum()})
    for number in range(4):
        images, sizes = torch.rand(1, 3, 4, 4, device="cuda:1"), torch.full((1, 2), number, device="cuda:1")
        torch.testing.assert_close(graphed(images, sizes)["found"], graphed.run(images, sizes)["found"])
    assert graphed.captured == 1 and torch.cuda.current_device() == 0


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "ema_decay": 0.9, "clip_gradient_norm": 0.0}])
def test_training_steps_as_graphs_equal_other_steps(gpu, shapes, tmp_path, changes, monkeypatch):
    """Two shapes of batches, other objects and learning rates in each step, and a loss that is not finite."""
    monkeypatch.setattr(losses, "_positive_slots", lambda positive, slots: slots)  # as on a GPU
    loss = LossConfig(rpn_samples=32, box_samples=16)
    config = TrainConfig(
        model=tiny_config(), loss=loss, batch_size=2, workers=0, device="cpu", tensorboard=False, **changes
    )
    trainer = Trainer(config, tmp_path / "run", CocoDataset.load(shapes, "train"))
    trainer.load_weights(lively_model(tiny_config()).state_dict(), "a lively model")
    batches = [dataclasses.replace(batch, images=batch.images.float()) for batch in list(trainer.loader)[:4]]
    assert len({batch.valid.shape[1] for batch in batches}) > 1
    narrow = dataclasses.replace(batches[1], images=batches[1].images[..., :64].clone())
    infinite = dataclasses.replace(batches[2], images=batches[2].images * torch.nan)
    order = [batches[0], narrow, batches[1], narrow, batches[2], infinite, batches[3], narrow, batches[0], narrow]

    def steps(cuda_graphs):
        model = copy.deepcopy(trainer.model)
        settings = dataclasses.replace(config, cuda_graphs=cuda_graphs)
        optimizer = make_optimizer(model, settings)
        averaged = AveragedWeights(model, config.ema_decay) if config.ema_decay else None
        step = Step(model, optimizer, settings, torch.device("cpu"), "fp32", averaged=averaged)
        metrics = []
        for number, batch in enumerate(order):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + number)
            metrics.append({name: float(value) for name, value in step.run([batch]).items()})
        state = dict(model.state_dict())
        if averaged is not None:
            state |= {f"averaged.{name}": value for name, value in averaged.model.state_dict().items()}
        return step, metrics, state, optimizer

    _, expected, weights, _ = steps(cuda_graphs=False)
    with gpu:
        step, found, graphed_weights, optimizer = steps(cuda_graphs=True)
    assert step.graphs.captured == 2 and not gpu.races
    assert [each["finite"] for each in expected] == [1, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert other == pytest.approx(one, rel=1e-5, nan_ok=True), number
    for name, value in weights.items():
        torch.testing.assert_close(graphed_weights[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert all(group["lr"] == 0.001 and not group.get("capturable") for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("changes", "found"),
    [({}, "cuda_graphs with device cpu"), ({"accumulate": 2}, "device cpu and accumulate 2")],
)
def test_steps_that_cannot_be_graphs_are_refused(shapes, tmp_path, changes, found):
    config = TrainConfig(model=tiny_config(), cuda_graphs=True, device="cpu", batch_size=2, **changes)
    with pytest.raises(UserError, match=found):
        Trainer(config, tmp_path / "run", CocoDataset.load(shapes, "train"))
