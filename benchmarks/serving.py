"""Requests per second and latency of a model in this process and through a Triton server.

    python benchmarks/serving.py MODEL --server localhost:8001 [--name NAME] [--images FOLDER] [--clients 1,2,4,8,16]
                                       [--seconds 10] [--pid PID] [--soak SECONDS]

A request covers one image file in memory, from its bytes to boxes and run lengths of masks: `Detector.detect` in N
threads of this process against N clients of the server (gRPC). Closed loop: each client sends its next request when it
receives the answer. Open loop: requests arrive at random at a fixed average rate, a share of the best closed-loop rate,
and latency is measured from the arrival. `--pid` also measures the CPU time of the server (PID and its children): on a
shared machine, requests per second depend on scheduling, while CPU time hardly does. `--soak` keeps 4 clients busy and
prints the memory of the server processes at regular intervals.
"""

from __future__ import annotations

import argparse
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image
from session import aligned, numbers
from session import count as positive
from timing import environment, machine, percentile

from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError, report_errors

_SIZES_HW = ((480, 640), (640, 480))  # of generated images: the most frequent sizes in COCO
_SHARES = (0.5, 0.8, 0.95)  # of the best throughput, in the open loop
_WORKERS = 64  # maximum concurrent requests in the open loop
_LOCAL, _REMOTE = "in process", "Triton"
_TURNS = 4  # repetitions of each measurement
_SOAK_CLIENTS, _SOAK_ROWS = 4, 6

Call = Callable[[int], object]  # the request's number


@dataclass(frozen=True)
class Load:
    """Completed requests of a measurement."""

    latencies_ms: tuple[float, ...]
    seconds: float
    errors: int
    cpu_seconds: float | None  # of this process and the server; None: unknown

    @property
    def per_second(self) -> float:
        """Throughput."""
        return len(self.latencies_ms) / self.seconds

    def cells(self) -> list[str]:
        """Throughput, three percentiles in ms, CPU time per request in ms, and errors, for a table."""
        shown = [f"{percentile(self.latencies_ms, p):.0f}" if self.latencies_ms else "" for p in (50, 90, 99)]
        cpu = "" if self.cpu_seconds is None else f"{1e3 * self.cpu_seconds / max(len(self.latencies_ms), 1):.0f}"
        return [f"{self.per_second:.1f}", *shown, cpu, str(self.errors)]


class _Record:
    """Latencies and errors; thread-safe."""

    def __init__(self) -> None:
        self.latencies_ms: list[float] = []
        self.errors = 0
        self._lock = threading.Lock()

    def request(self, call: Call, number: int, arrival: float) -> None:
        try:
            call(number)
        except Exception:  # counted: one failed request must not end the measurement
            with self._lock:
                self.errors += 1
            return
        latency = 1e3 * (time.perf_counter() - arrival)
        with self._lock:
            self.latencies_ms.append(latency)

    def load(self, seconds: float) -> Load:
        return Load(tuple(self.latencies_ms), seconds, self.errors, None)


def closed_loop(call: Call, clients: int, seconds: float) -> Load:
    """Runs `clients` threads that each send the next request when the previous one is answered."""
    record, numbers_, began = _Record(), count(), time.perf_counter()

    def work() -> None:
        while (now := time.perf_counter()) < began + seconds:
            record.request(call, next(numbers_), now)

    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(work) for _ in range(clients)]:
            future.result()
    return record.load(time.perf_counter() - began)


def open_loop(call: Call, rate: float, seconds: float, seed: int = 0) -> Load:
    """Sends requests at random times, on average `rate` per second, without waiting for earlier answers."""
    record, began = _Record(), time.perf_counter()
    gaps = np.random.default_rng(seed).exponential(1 / rate, max(round(rate * seconds), 1))
    with ThreadPoolExecutor(_WORKERS) as pool:
        for number, arrival in enumerate(began + np.cumsum(gaps)):
            time.sleep(max(0.0, arrival - time.perf_counter()))
            pool.submit(record.request, call, number, float(arrival))
    return record.load(time.perf_counter() - began)


def soak(call: Call, seconds: float, memory_mb: Callable[[], float]) -> Iterator[tuple[float, float, Load]]:
    """Keeps clients busy; yields elapsed minutes, memory, and the load since the last row."""
    for row in range(1, _SOAK_ROWS + 1):
        load = closed_loop(call, _SOAK_CLIENTS, seconds / _SOAK_ROWS)
        yield row * seconds / _SOAK_ROWS / 60, memory_mb(), load


def tree_mb(pid: int) -> float:
    """Proportional set size of a process and its descendants, in MB: shared pages count once."""
    import psutil

    root = psutil.Process(pid)
    return sum(each.memory_full_info().pss for each in [root, *root.children(recursive=True)]) / 1e6


def cpu_seconds(pid: int | None) -> float:
    """CPU seconds used so far by this process and, if given, by another process and its descendants."""
    spent = time.process_time()
    if pid is not None:
        import psutil

        root = psutil.Process(pid)
        spent += sum(sum(each.cpu_times()[:2]) for each in [root, *root.children(recursive=True)])
    return spent


def in_process(path: Path, files: Sequence[bytes], threads: int) -> Call:
    """Returns a call that runs a request in this process."""
    from maskrcnn.data.images import decode_image
    from maskrcnn.runtime import Detector

    detector = Detector.load(path, threads=threads)

    def call(number: int) -> object:
        image = decode_image(files[number % len(files)], "image", detector.preprocessing)
        (found,) = detector.detect([image])
        return found.rles() if found.has_masks else found

    return call


def through_triton(server: str, name: str, files: Sequence[bytes]) -> Call:
    """Returns a call that sends a request to a server."""
    import tritonclient.grpc as triton

    client = triton.InferenceServerClient(server)
    try:
        ready = client.is_model_ready(name)
    except triton.InferenceServerException as error:
        raise UserError(
            f"no answer from {server} ({error.message()})",
            "the gRPC endpoint of a Triton server",
            "start one: tritonserver --model-repository=FOLDER, see docs/serving.md",
        ) from error
    if not ready:
        raise UserError(f"no model {name} on {server}", "a model of `maskrcnn triton`", "specify it with --name")
    inputs = []
    for file in files:
        inputs.append(triton.InferInput("image", [1, 1], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array([[file]], object))

    def call(number: int) -> object:
        answer = client.infer(name, [inputs[number % len(inputs)]])
        return answer.as_numpy("boxes")

    return call


def image_files(folder: Path | None) -> list[bytes]:
    """The contents of the image files in a folder, or of eight generated JPEG files."""
    if folder is not None:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not files:
            raise UserError(f"no images in {folder}", "JPEG or PNG files", "pass another folder with --images")
        return [path.read_bytes() for path in files]
    drawn, rng = [], np.random.default_rng(0)
    for number in range(8):
        file = io.BytesIO()
        Image.fromarray(shapes_image(rng, _SIZES_HW[number % 2])[0]).save(file, "JPEG", quality=90)
        drawn.append(file.getvalue())
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options, measures, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model file for the measurement in this process")
    parser.add_argument("--server", required=True, help="host and port of the server's gRPC endpoint")
    parser.add_argument("--name", help="name of the model on the server (default: from the file name)")
    parser.add_argument("--images", type=Path, help="folder of JPEG and PNG files (default: generated JPEG files)")
    parser.add_argument("--clients", type=numbers, default=(1, 2, 4, 8, 16), help="default: 1,2,4,8,16")
    parser.add_argument(
        "--seconds", type=positive, default=10, help="duration of each measurement, seconds (default: 10)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of the model in this process (default: all cores)"
    )
    parser.add_argument(
        "--soak", type=positive, help="sample memory under load for this many seconds instead of printing the tables"
    )
    parser.add_argument("--pid", type=int, help="PID of the server process, to measure its CPU time and memory")
    given = parser.parse_args(arguments)
    if given.soak and not given.pid:
        parser.error("--soak needs --pid")
    with report_errors():
        from maskrcnn.runtime.serving.triton import default_name

        files = image_files(given.images)
        remote = through_triton(given.server, given.name or default_name(given.model), files)
        if given.soak:
            remote(0)
            print(aligned(["minutes", "MB  ", "requests/s", "errors"], []))
            for minutes, mb, load in soak(remote, given.soak, lambda: tree_mb(given.pid)):
                print(f"| {minutes:<7.1f} | {mb:<4.0f} | {load.per_second:<10.1f} | {load.errors:<6} |", flush=True)
            return
        _compare(in_process(given.model, files, given.threads), remote, given.clients, given.seconds, given.pid)


def _in_turns(calls: dict[str, Call], pid: int | None, measure: Callable[[str, Call], Load]) -> dict[str, Load]:
    """Measures the calls repeatedly in turn, so that machine drift affects all of them; merges each call's loads."""
    loads: dict[str, list[Load]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            call(0)
            spent = cpu_seconds(pid)
            load = measure(name, call)
            is_known = pid is not None or name == _LOCAL
            loads[name].append(replace(load, cpu_seconds=cpu_seconds(pid) - spent if is_known else None))
    return {
        name: Load(
            tuple(latency for load in parts for latency in load.latencies_ms),
            sum(load.seconds for load in parts),
            sum(load.errors for load in parts),
            None if parts[0].cpu_seconds is None else sum(load.cpu_seconds or 0 for load in parts),
        )
        for name, parts in loads.items()
    }


def _compare(local: Call, remote: Call, clients: Sequence[int], seconds: float, pid: int | None) -> None:
    calls = {_LOCAL: local, _REMOTE: remote}
    head = ["requests/s", "p50 ms", "p90 ms", "p99 ms", "CPU ms", "errors"]
    rows, best = [], dict.fromkeys(calls, 0.0)
    for number in clients:
        loads = _in_turns(calls, pid, lambda _, call, n=number: closed_loop(call, n, seconds / _TURNS))
        for name, load in loads.items():
            best[name] = max(best[name], load.per_second)
            rows.append([str(number), name, *load.cells()])
    print(aligned(["clients", "where", *head], rows))
    print(f"\nbest throughput through Triton: {best[_REMOTE] / best[_LOCAL]:.2f} of the in-process throughput\n")
    rows = []
    for share in _SHARES:
        rates = {name: share * rate for name, rate in best.items()}
        loads = _in_turns(calls, pid, lambda name, call, r=rates: open_loop(call, r[name], seconds / _TURNS))
        rows += [[f"{rates[name]:.1f}/s ({share:.0%})", name, *load.cells()] for name, load in loads.items()]
    print(aligned(["arrivals", "where", *head], rows) + "\n")
    print("\n".join(machine(environment())))


if __name__ == "__main__":
    main()
