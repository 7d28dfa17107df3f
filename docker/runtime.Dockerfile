# ONNX files and OpenVINO engines on a CPU, without PyTorch:
#   docker build -f docker/runtime.Dockerfile -t maskrcnn-runtime .
#   docker run --rm --user "$(id -u)" -v "$PWD:/data" maskrcnn-runtime predict photo.jpg --model model.onnx
FROM python:3.12-slim

WORKDIR /src
COPY requirements-runtime.txt ./
RUN pip install --no-cache-dir -r requirements-runtime.txt "openvino>=2025.3"
COPY pyproject.toml README.md LICENSE ./
COPY maskrcnn maskrcnn
COPY export export
COPY plugins plugins
COPY runtime runtime
COPY benchmarks benchmarks
COPY configs configs
RUN pip install --no-cache-dir --no-deps . && rm -rf build

USER 1000
WORKDIR /data
ENTRYPOINT ["maskrcnn"]
CMD ["--help"]
