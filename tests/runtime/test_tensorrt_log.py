"""The logger passed to TensorRT: one per module, with a log for each listener."""

import gc
import threading
import weakref

import pytest

pytest.importorskip("cuda.bindings.runtime")  # used by fake_cuda

import fake_tensorrt
from fake_tensorrt import Severity

from maskrcnn.errors import UserError
from maskrcnn.runtime.backends.tensorrt_engine import load_plan
from maskrcnn.runtime.backends.tensorrt_library import Message, listen
from maskrcnn.runtime.build.messages import failure
from maskrcnn.runtime.build.profiles import Profile, Span


class Module:
    """The part of `tensorrt` that loggers need."""

    ILogger = fake_tensorrt.ILogger


@pytest.fixture
def trt():
    return Module()


def texts(log):
    return [message.text for message in log.messages]


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_each_log_starts_when_it_is_created(trt):
    first = listen(trt)
    first.logger.log(Severity.ERROR, "one")
    second = listen(trt)
    second.logger.log(Severity.WARNING, "two")
    assert first.logger is second.logger
    assert texts(first) == ["one", "two"]
    assert second.messages == [Message("WARNING", "two")]
    first.restart()
    assert texts(first) == [] and texts(second) == ["two"]


def test_information_is_left_out(trt):
    log = listen(trt)
    for severity in Severity:
        log.logger.log(severity, severity.name)
    assert texts(log) == ["INTERNAL_ERROR", "ERROR", "WARNING"]


def test_the_logger_lives_as_long_as_its_module(trt):
    logger = weakref.ref(listen(trt).logger)
    gc.collect()
    assert logger() is not None and listen(trt).logger is logger()
    other = Module()
    of_the_other = weakref.ref(listen(other).logger)
    assert of_the_other() is not logger()
    del other
    gc.collect()
    assert of_the_other() is None


def test_a_thread_takes_its_own_messages_once(trt):
    log = listen(trt)
    in_thread(lambda: log.logger.log(Severity.ERROR, "elsewhere"))
    log.logger.log(Severity.ERROR, "here")
    assert [message.text for message in log.take()] == ["here"]
    assert [message.text for message in log.take()] == ["elsewhere"]  # those of other threads if it has none
    assert texts(log) == ["elsewhere"]


def test_threads_lose_no_message(trt):
    log, found, count = listen(trt), {}, 40

    def work(number):
        own = listen(trt)
        for index in range(count):
            own.logger.log(Severity.ERROR, f"{number} {index}")
            own.messages  # noqa: B018 - reads while others write
        found[number] = [message.text for message in own.take()]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [f"{number} {index}" for index in range(count)] for number in range(8)}
    assert log.messages == []


def test_the_newest_are_kept(trt):
    log = listen(trt)
    for number in range(2000):
        log.logger.log(Severity.WARNING, str(number))
    found = texts(log)
    assert found[-1] == "1999" and len(found) < 2000 and found == [str(n) for n in range(2000 - len(found), 2000)]


def test_an_error_contains_the_messages_since_the_log_started(trt):
    listen(trt).logger.log(Severity.ERROR, "out of memory")
    log = listen(trt)
    assert failure(log.messages, "no engine", "one").found == "no engine: TensorRT logged no reason"
    log.logger.log(Severity.ERROR, "the moon is full")
    assert failure(log.messages, "no engine", "one").found == "no engine:\n  the moon is full"


def test_an_engine_does_not_report_the_errors_of_another(monkeypatch, onnx_file, tmp_path):
    _, module = fake_tensorrt.install(monkeypatch)
    any_size = Profile(Span(1, 1, 2), Span(32, 64, 96), Span(32, 96, 96))
    path = fake_tensorrt.write_engine(onnx_file, tmp_path / "a.engine", [any_size])
    one, other = load_plan(path, 0), load_plan(path, 0)
    module.say("out of memory")
    assert "too little free memory" in one.failure("no context").found
    module.say("enqueue: no luck")
    assert other.failure("no run").found == "no run:\n  enqueue: no luck"
    assert "TensorRT logged no reason" in one.failure("no run").found
    (tmp_path / "a.engine").write_bytes(b"broken")
    with pytest.raises(UserError, match="a plan of another version of TensorRT"):
        load_plan(path, 0)
