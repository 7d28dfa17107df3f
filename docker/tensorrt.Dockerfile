# TensorRT engines: build, check and run them on the GPU of this machine, without PyTorch:
#   docker build -f docker/tensorrt.Dockerfile -t maskrcnn-tensorrt .
#   docker run --rm --gpus all --user "$(id -u)" -v "$PWD:/data" maskrcnn-tensorrt build-engine model.onnx --fp16
# Another release of NVIDIA's image, which sets the version of TensorRT: --build-arg RELEASE=26.07
ARG RELEASE=26.07
FROM nvcr.io/nvidia/tensorrt:${RELEASE}-py3

# TensorRT's Python package is the image's.
RUN python3 -m venv --system-site-packages /opt/maskrcnn
ENV PATH=/opt/maskrcnn/bin:$PATH
WORKDIR /src
COPY requirements-runtime.txt ./
RUN pip install --no-cache-dir -r requirements-runtime.txt "onnxscript>=0.5.6" "cuda-python>=12.6"
COPY pyproject.toml README.md LICENSE ./
COPY maskrcnn maskrcnn
COPY export export
COPY plugins plugins
COPY runtime runtime
COPY benchmarks benchmarks
COPY configs configs
RUN pip install --no-cache-dir --no-deps . && rm -rf build && python -c "import tensorrt; print(tensorrt.__version__)"

USER 1000
WORKDIR /data
ENTRYPOINT ["maskrcnn"]
CMD ["doctor"]
