"""NVIDIA's Triton server with its Python backend, from the nvidia-pytriton wheel. `make .venv` installs it in the
virtual environment's folder `triton`, with a NumPy that this server's Python can use.
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
from PIL import Image

_WHEEL = Path(sys.prefix) / "triton"
_TRITON = _WHEEL / "pytriton" / "tritonserver"
_VERSION = "{}.{}".format(*sys.version_info)
_STUB = _TRITON / "python_backend_stubs" / _VERSION / "triton_python_backend_stub"
# The steps' only packages besides Python's standard library: the server's Python is isolated from this environment.
_STEP_PACKAGES = ("PIL", "pillow.libs", "onnxruntime", "openvino")


def obstacle() -> str | None:
    """Returns the reason why there is no server, or None."""
    if not (_TRITON / "bin" / "tritonserver").is_file() or not _STUB.is_file():
        return f"no Triton server for Python {_VERSION} in {_WHEEL}, see the Makefile"
    try:
        ctypes.CDLL(f"libpython{_VERSION}.so.1.0")
        import tritonclient.http  # noqa: F401
    except (OSError, RuntimeError, ImportError) as error:
        return str(error)
    return None


class Server:
    """A running server on free ports of the loopback interface.

    Args:
        repository: the model repository.
        folder: folder for its files.
        flags: additional arguments of tritonserver.

    Raises:
        RuntimeError: if it is not ready within five minutes; contains the end of its log.
    """

    def __init__(self, repository: Path, folder: Path, *flags: str) -> None:
        self.http, self.grpc, metrics = (f"127.0.0.1:{port}" for port in _free_ports(3))
        self.log = folder / "server.log"
        command = [
            str(_TRITON / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={_backends(folder / 'backends')}",
            *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
            f"--http-port={self.http.partition(':')[2]}",
            f"--grpc-port={self.grpc.partition(':')[2]}",
            f"--metrics-port={metrics.partition(':')[2]}",
            *flags,
        ]
        # The server's Python uses the first environment on PATH: it must not be this one, as it cannot use its NumPy.
        folders = [folder for folder in os.get_exec_path() if folder != str(Path(sys.prefix) / "bin")]
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(_WHEEL / "nvidia_pytriton.libs"),
            "PATH": os.pathsep.join(folders),
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def _wait(self) -> None:
        import tritonclient.grpc

        client = tritonclient.grpc.InferenceServerClient(self.grpc)
        for _ in range(3000):
            if self.process.poll() is not None:
                break
            try:
                if client.is_server_ready():
                    return
            except tritonclient.grpc.InferenceServerException:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"tritonserver is not ready:\n{self.log.read_text()[-4000:]}")

    def steps(self, model: str) -> list[psutil.Process]:
        """The running processes of a Python model."""
        children = psutil.Process(self.process.pid).children()
        children = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return [child for child in children if any(f"/{model}/" in word for word in child.cmdline())]

    def stop(self) -> int:
        """Stops the server as `docker stop` does, and returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """Kills the server and its steps if it is still running."""
        if self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
            for child in children:
                if child.is_running():
                    child.kill()


def infer(kind: ModuleType, client: Any, model: str, files: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Sends one request with image files, through `tritonclient.http` or `tritonclient.grpc`; returns the outputs."""
    data = np.array([[file] for file in files], object)
    image = kind.InferInput("image", data.shape, "BYTES")
    image.set_data_from_numpy(data)
    answer = client.infer(model, [image])
    response = answer.get_response()
    outputs = response["outputs"] if isinstance(response, dict) else response.outputs
    names = [output["name"] if isinstance(output, dict) else output.name for output in outputs]
    return {name: answer.as_numpy(name) for name in names}


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    """The content of an image file, or of an .npy file."""
    file = io.BytesIO()
    np.save(file, image) if kind == "NPY" else Image.fromarray(image).save(file, kind)
    return file.getvalue()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _backends(folder: Path) -> Path:
    """Creates a folder with the Python backend, which searches this folder for packages."""
    python = folder / "python"
    python.mkdir(parents=True)
    installed = Path(np.__file__).parents[1]
    files = [*(_TRITON / "backends" / "python").iterdir(), _STUB, _WHEEL / "numpy", _WHEEL / "numpy.libs"]
    for file in [*files, *(installed / package for package in _STEP_PACKAGES)]:
        if file.exists():  # some wheels have no library folder
            (python / file.name).symlink_to(file)
    return folder


if __name__ == "__main__":  # python tests/support/triton_server.py REPOSITORY [FLAGS]
    with tempfile.TemporaryDirectory() as temporary:
        server = Server(Path(sys.argv[1]), Path(temporary), *sys.argv[2:])
        print(f"http {server.http}, grpc {server.grpc}, pid {server.process.pid}", flush=True)
        try:
            server.process.wait()
        finally:
            server.kill()
